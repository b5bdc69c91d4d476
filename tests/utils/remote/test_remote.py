"""Remote files and corpora: what a user gets from servers that are right, slow, or at fault."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.remote_tools import Site, serving
from tests.stream_tools import write_corpus
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.corpus.data import open_data
from utils.remote import cache as remote
from utils.remote import storage as remote_storage
from utils.remote.cache import fetch, is_remote
from utils.remote.storage import Storage

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")

ROOT = Path(__file__).resolve().parents[3]
BODY = bytes(range(256)) * 800  # 200 KiB


@pytest.fixture
def site() -> Iterator[Site]:
    with serving() as started:
        yield started


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ATHENA_CACHE", str(folder))
    monkeypatch.setattr(remote_storage, "FIRST_PAUSE", 0.001)
    return folder


def start_fetch(url: str) -> subprocess.Popen[str]:
    code = f"from utils.remote.cache import fetch; print(fetch({url!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def copies(cache: Path) -> list[Path]:
    """Files of finished copies, and of any that are not."""
    return [path for path in cache.rglob("*") if path.is_file() and path.name != "lock"]


def failure(url: str) -> str:
    with pytest.raises(UserError) as caught:
        fetch(url)
    message = str(caught.value)
    assert url in message and "\n" not in message, message
    return message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gs://bucket/x", True),
        ("https://host/x", True),
        ("s3a://b", True),
        ("data/athena", False),
        ("/data/a:b//c", False),
        (r"C:\data", False),
        ("-", False),
    ],
)
def test_what_is_remote(path: str, expected: bool):
    assert is_remote(path) is expected


# --- copies -----------------------------------------------------------------------------------


def test_a_file_keeps_its_name_and_is_downloaded_once(site: Site):
    site.files["/data/some%20text.jsonl.zst"] = BODY
    for url in ("/data/some%20text.jsonl.zst", "/data/some text.jsonl.zst?key=a%2Fb"):
        copy = fetch(site.url + url)
        assert copy.name == "some text.jsonl.zst" and copy.read_bytes() == BODY
        assert fetch(site.url + url) == copy
    assert site.gets("/data/some%20text.jsonl.zst") == 2


def test_a_folder_is_copied_with_all_below_it(site: Site, cache: Path):
    files = {"train/all/inputs.npy": BODY, "train/all/dataset.json": b"{}", "top.json": b""}
    site.files |= {f"/data/corpus/{name}": body for name, body in files.items()}
    site.files["/data/corpus2/other"] = b"not of this folder"
    site.links += ["?C=N;O=D", "../", "/elsewhere/x", "http://example.org/y"]
    copy = fetch(site.url + "/data/corpus")
    assert copy.name == "corpus" and tree(copy) == files
    assert fetch(site.url + "/data/corpus/") == copy
    assert [site.gets(f"/data/corpus/{name}") for name in files] == [1, 1, 1]
    assert len(copies(cache)) == len(files)


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_a_changed_remote_is_downloaded_again_beside_the_older_copy(site: Site, header: str):
    site.files["/x.txt"], site.headers[header] = b"one", "monday"
    old = fetch(site.url + "/x.txt")
    assert fetch(site.url + "/x.txt") == old and site.gets("/x.txt") == 1
    site.files["/x.txt"], site.headers[header] = b"two", "tuesday"
    new = fetch(site.url + "/x.txt")
    assert new.read_bytes() == b"two" and old.read_bytes() == b"one"  # a run may be reading it


def test_a_changed_size_is_a_change(site: Site):
    site.files["/x.txt"] = b"one"
    old = fetch(site.url + "/x.txt")
    site.files["/x.txt"] = b"three"
    assert fetch(site.url + "/x.txt").read_bytes() == b"three"
    assert old.read_bytes() == b"one"


def test_what_was_deleted_from_the_cache_is_fetched_again(site: Site):
    site.files |= {"/c/a": b"a", "/c/b": b"b"}
    copy = fetch(site.url + "/c")
    (copy / "b").unlink()
    assert tree(fetch(site.url + "/c")) == {"a": b"a", "b": b"b"}


def test_compressed_files_arrive_as_they_are_stored(site: Site):
    site.files["/x.txt.gz"] = packed = gzip.compress(BODY)
    site.headers["Content-Encoding"] = "gzip"
    assert fetch(site.url + "/x.txt.gz").read_bytes() == packed


def test_the_same_name_at_two_places_is_two_copies(site: Site):
    site.files |= {"/a/x.txt": b"a", "/b/x.txt": b"b"}
    read = [fetch(f"{site.url}/{place}/x.txt").read_bytes() for place in "ab"]
    assert read == [b"a", b"b"]


def test_other_file_systems(tmp_path: Path):
    (tmp_path / "here" / "deep").mkdir(parents=True)
    (tmp_path / "here" / "deep" / "x.txt").write_bytes(b"x")
    assert tree(fetch(f"file://{tmp_path}/here")) == {"deep/x.txt": b"x"}
    fsspec.filesystem("memory").pipe({"/bucket/c/a.txt": b"a", "/bucket/c/d/b.txt": b"b"})
    assert tree(fetch("memory://bucket/c")) == {"a.txt": b"a", "d/b.txt": b"b"}
    first = fetch("memory://bucket/c/a.txt")
    fsspec.filesystem("memory").pipe("/bucket/c/a.txt", b"A")
    assert fetch("memory://bucket/c/a.txt").read_bytes() == b"A"
    assert first.read_bytes() == b"a"


class Forgetless(fsspec.get_filesystem_class("memory")):
    """Remembers what it was asked, as the file systems of clouds do."""

    protocol = "forgetless"
    answers: ClassVar[dict[str, dict]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("forgetless://", "memory://"))

    def info(self, path: str, **options: object) -> dict:
        if path not in self.answers:
            self.answers[path] = super().info(path, **options)
        return self.answers[path]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.answers.clear()


def test_a_change_is_seen_by_a_process_that_asked_before():
    fsspec.register_implementation("forgetless", Forgetless, clobber=True)
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket3/x.txt", b"one")
    assert fetch("forgetless://bucket3/x.txt").read_bytes() == b"one"
    memory.pipe("/bucket3/x.txt", b"two")
    assert fetch("forgetless://bucket3/x.txt").read_bytes() == b"two"


def test_a_listing_cannot_write_elsewhere(site: Site, tmp_path: Path):
    site.files |= {"/c/a": b"a", "/evil": b"evil"}
    site.links.append("..%2F..%2F..%2F..%2Fevil")
    site.files["/c/..%2F..%2F..%2F..%2Fevil"] = b"evil"
    with pytest.raises(UserError, match="outside"):
        fetch(site.url + "/c")
    assert not list(tmp_path.rglob("evil"))


def test_secrets_in_a_url_are_not_written_down(site: Site, cache: Path):
    site.files["/x.txt"] = b"x"
    url = site.url.replace("//", "//me:hush@") + "/x.txt?signature=hush"
    assert fetch(url).name == "x.txt"
    assert not [path for path in cache.rglob("*") if "hush" in str(path)]
    site.files.clear()
    with pytest.raises(UserError) as caught:
        fetch(url)
    assert "hush" not in str(caught.value)


# --- several processes --------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_ask_at_once_download_once(site: Site):
    site.files |= {"/corpus/inputs.npy": BODY, "/corpus/labels.npy": BODY[::-1]}
    site.pause = 0.05
    ranks = [start_fetch(site.url + "/corpus") for _ in range(2)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    paths = {output.strip() for output, _ in outputs}
    assert len(paths) == 1
    assert tree(Path(paths.pop())) == {"inputs.npy": BODY, "labels.npy": BODY[::-1]}
    assert site.gets("/corpus/inputs.npy") == site.gets("/corpus/labels.npy") == 1


@pytest.mark.slow
def test_a_killed_download_leaves_nothing_that_is_taken_for_whole(site: Site, cache: Path):
    site.files |= {"/corpus/a": BODY, "/corpus/b": BODY}
    site.pause = 0.2
    process = start_fetch(site.url + "/corpus")
    deadline = time.monotonic() + 30
    # Some of the second file has arrived: the moment at which half a corpus is there.
    while not any(path.name == "b" and path.stat().st_size for path in copies(cache)):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(copies(cache)) == 2  # the test did kill it in the middle
    site.pause = 0
    copy = fetch(site.url + "/corpus")
    assert tree(copy) == {"a": BODY, "b": BODY}
    assert site.gets("/corpus/a") == 2
    assert len(copies(cache)) == 2  # what the killed one left is gone


# --- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "words"), [(404, "does not exist"), (403, "is denied")])
def test_what_is_not_there_or_not_allowed_is_asked_for_once(site: Site, status: int, words: str):
    site.always = status
    assert words in failure(site.url + "/x.txt")
    assert site.gets("/x.txt") == 1


def test_a_server_that_recovers_is_asked_again(site: Site):
    site.files["/x.txt"] = b"x"
    site.faults += [500, 503, 429, 500]  # HEAD and GET, twice
    assert fetch(site.url + "/x.txt").read_bytes() == b"x"
    site.faults += [200, 502]  # the download itself
    site.headers["ETag"] = "changed"
    assert fetch(site.url + "/x.txt").read_bytes() == b"x"


def test_a_server_that_does_not_recover(site: Site):
    site.always = 500
    assert "HTTP 500" in failure(site.url + "/x.txt")
    assert site.gets("/x.txt") == remote_storage.ATTEMPTS


@pytest.mark.parametrize("cut", ["honest", "silent"])
def test_half_a_file_is_never_returned(site: Site, cache: Path, cut: str):
    site.files |= {"/c/x.bin": BODY, "/c/y.bin": BODY}
    site.cut = cut
    for url in (site.url + "/c/x.bin", site.url + "/c"):
        with pytest.raises(UserError, match="cannot download"):
            fetch(url)
        assert not copies(cache)
    assert site.gets("/c/x.bin") == 2 * remote_storage.ATTEMPTS
    site.cut = None
    assert fetch(site.url + "/c/x.bin").read_bytes() == BODY


def test_a_remote_that_changes_meanwhile_is_not_mixed(
    site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    site.files |= {"/c/a": b"old", "/c/b": b"old"}
    download = remote_storage.Storage.download

    def and_upload(self, file, target, progress):
        download(self, file, target, progress)
        site.headers["ETag"] = "new"

    monkeypatch.setattr(remote_storage.Storage, "download", and_upload)
    assert "changed" in failure(site.url + "/c")
    assert not copies(cache)


def test_without_the_network_the_last_copy_serves(site: Site):
    site.files["/x.txt"] = b"x"
    url = site.url + "/x.txt"
    site.always = 503
    failure(url)
    site.always = None
    copy = fetch(url)
    site.always = 503
    with pytest.warns(UserWarning, match=r"x\.txt.*cached copy"):
        assert fetch(url) == copy
    site.always = 404  # that is an answer
    assert "does not exist" in failure(url)


def test_nobody_listens():
    assert "cannot download" in failure("http://127.0.0.1:9/x")


@pytest.mark.parametrize(
    ("url", "missing", "install"),
    [
        ("gs://bucket/x", "gcsfs", "pip install fsspec gcsfs"),
        ("s3://bucket/x", "s3fs", "pip install fsspec s3fs"),
        ("hf://datasets/a/b", "huggingface_hub", "pip install fsspec huggingface_hub"),
        ("https://host/x", "aiohttp", "pip install fsspec aiohttp"),
        ("memory://x", "fsspec", "pip install fsspec"),
    ],
)
def test_missing_packages_are_named(
    url: str, missing: str, install: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as caught:
        fetch(url)
    assert install in str(caught.value)


def test_a_storage_that_nobody_knows():
    assert "nowhere://" in failure("nowhere://x/y")


def test_a_cache_that_cannot_be_written(site: Site, tmp_path: Path, monkeypatch):
    site.files["/x.txt"] = b"x"
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("ATHENA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="ATHENA_CACHE"):
        fetch(site.url + "/x.txt")


def test_a_full_disk_is_not_called_a_fault_of_the_network(site: Site, monkeypatch):
    site.files["/x.txt"] = b"x"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*ATHENA_CACHE"):
        fetch(site.url + "/x.txt")
    assert site.gets("/x.txt") == 1


# --- expand -------------------------------------------------------------------------------------


def test_expand_over_the_web(site: Site):
    site.files |= {f"/d/{name}": b"" for name in ("b.jsonl", "a.jsonl", "c.txt", "e/f.jsonl")}
    site.links += ["?C=N;O=D"]
    base = site.url + "/d"
    assert Storage(base + "/*.jsonl").urls() == [base + "/a.jsonl", base + "/b.jsonl"]
    assert Storage(base).urls() == [
        f"{base}/{name}" for name in ("a.jsonl", "b.jsonl", "c.txt", "e/f.jsonl")
    ]
    assert Storage(base + "/c.txt").urls() == [base + "/c.txt"]
    with pytest.raises(UserError, match="matches no file"):
        Storage(base + "/*.parquet").urls()
    with pytest.raises(UserError, match="does not exist"):
        Storage(base + "/none.txt").urls()


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_what_expand_gives_can_be_fetched(scheme: str, tmp_path: Path):
    root = f"{tmp_path}/bucket" if scheme == "file" else "/bucket2"
    system = fsspec.filesystem(scheme)
    for name in ("b.txt", "a.txt", "d/c.txt"):
        system.makedirs(f"{root}/d", exist_ok=True)
        system.pipe(f"{root}/{name}", name.encode())
    url = f"{scheme}://{root.removeprefix('/') if scheme == 'memory' else root}"
    urls = Storage(f"{url}/[ab].txt").urls()
    assert urls == [f"{url}/a.txt", f"{url}/b.txt"]
    assert [fetch(found).read_bytes() for found in Storage(url).urls()] == [
        b"a.txt",
        b"b.txt",
        b"d/c.txt",
    ]


# --- training -----------------------------------------------------------------------------------


def test_training_reads_a_remote_corpus(tmp_path: Path, site: Site):
    write_corpus(tmp_path / "one", rows=5)
    write_corpus(tmp_path / "two", rows=3, split="test")
    for name in ("one", "two"):
        files = tree(tmp_path / name)
        site.files |= {f"/{name}/{path}": body for path, body in files.items()}
    urls = {"data_paths": [site.url + "/one"], "data_paths_test": [site.url + "/two"]}
    config = PretrainConfig.model_construct(vocab_size=None, seq_len=None, **urls)
    data = open_data(config)
    assert data.train.num_rows == 5 and data.test is not None and data.test.num_rows == 3
    assert (Path(data.test_paths[0]) / "test").is_dir()
    assert config.data_paths == [site.url + "/one"]  # what checkpoints will say
    assert remote.cache_folder() in Path(data.test_paths[0]).parents
