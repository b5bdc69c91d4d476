"""Small real corpora for scripts that try out training: two of them, to be mixed."""

from pathlib import Path

from scripts.smoke_test import call, write_text


def small_corpora(folder: Path) -> list[Path]:
    """Two corpora of one tokenizer, rows of 32 tokens with budgets of 1 to 6 ACT steps."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = write_text(folder, None).read_text(encoding="utf-8").splitlines(keepends=True)
    tokenizer, corpora = folder / "tokenizer.json", []
    for i, name in enumerate(("first", "second")):
        part = folder / f"{name}.jsonl"
        part.write_text("".join(lines[i::2]), encoding="utf-8")
        if i == 0:
            call("-m", "dataset.train_tokenizer", "--input-files", part, "--vocab-size", "300",
                 "--output", tokenizer)  # fmt: skip
        corpora.append(folder / name)
        call("-m", "dataset.build_corpus_dataset", "--tokenizer-json", tokenizer, "--input-files",
             part, "--seq-len", "32", "--train-ratio", "0.9", "--min-iterations", "1",
             "--max-iterations", "6", "--output-dir", corpora[-1], "--overwrite")  # fmt: skip
    return corpora


# A model of seconds that has everything a checkpoint must bring back: rows that halt at different
# steps, an identifier embedding, averages, and a stream of two corpora.
TINY = """
    arch=athena_trm_tiny arch.hidden_size=32 arch.puzzle_emb_ndim=32 arch.halt_max_steps=4
    arch.force_min_steps=1 arch.halt_exploration_prob=0.3 arch.post_refinement_steps=0
    global_batch_size=8 epochs=null lr=1e-3 lr_warmup_steps=0 puzzle_emb_lr=1e-3 ema_rate=0.99
""".split()
