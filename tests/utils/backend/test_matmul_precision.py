"""matmul_precision: what torch is asked for on CUDA, as far as it goes without a card."""

import pytest
import torch
from training_tools import contents, make_config

from pretrain import train
from utils.backend.cpu import CPUBackend
from utils.backend.cuda import CUDABackend
from utils.config.load import compose_config, load_config


class AsOnCUDA(CPUBackend):
    """A CPU on which runs ask torch for what they would on CUDA; notes it in each step."""

    set_matmul_precision = CUDABackend.set_matmul_precision

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[bool, str, str]] = set()

    def to_device(self, batch):
        self.seen.add(precisions())
        return super().to_device(batch)


def precisions() -> tuple[bool, str, str]:
    """TF32 of products on CUDA; what torch compiles for; the precision of products on a CPU."""
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture(autouse=True)
def flags():
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


def run(text_corpus, folder, backend, *options):
    given = [f"checkpoint_path={folder}", "run_name=x", "max_steps=1", "evaluators=[]"]
    assert train(backend, make_config(text_corpus, *given, *options)) == 0
    return backend


def test_it_holds_for_training_and_evaluation_until_the_next_run(text_corpus, tmp_path):
    *default, cpu = precisions()
    assert default == [False, "highest"]
    high = (True, "high", cpu)
    given = "matmul_precision=high"
    assert run(text_corpus, tmp_path / "a", AsOnCUDA(), given).seen == {high}
    assert run(text_corpus, tmp_path / "b", AsOnCUDA()).seen == {(*default, cpu)}
    saved = f"load_checkpoint={tmp_path / 'a'}"
    assert run(text_corpus, tmp_path / "c", AsOnCUDA(), given, saved, "eval_only=true").seen == {
        high
    }


def test_a_resumed_run_may_change_it_and_a_cpu_ignores_it(text_corpus, tmp_path):
    before = precisions()
    steps = ("max_steps=3", "checkpoint_interval=1", "keep_checkpoints=null")
    run(text_corpus, tmp_path / "a", CPUBackend(), *steps)
    resumed = (f"resume={tmp_path / 'a' / 'step_1'}", "matmul_precision=high")
    run(text_corpus, tmp_path / "b", CPUBackend(), *steps, *resumed)
    assert precisions() == before
    one, other = (contents(tmp_path / name / "step_3") for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_recipe_for_cards_without_bfloat16_asks_for_tf32():
    config = load_config(compose_config(["device=cuda_float32", "data_paths=[random]"]))
    assert config.matmul_precision == "high"
    assert config.arch.options["forward_dtype"] == "float32"
