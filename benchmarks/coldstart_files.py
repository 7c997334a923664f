"""The files that coldstart.py starts servers on: checkpoints for the reference, and a bundle made of them for ours."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoints import write_checkpoint
from benchmarks.harness import ROOT
from benchmarks.small_upstream import upstream as small_files
from benchmarks.small_upstream import write_upstream
from blip.lavis import make_tokenizer
from blip.weights.download import File
from blip.weights.pretrained import Upstream, build, published


@dataclass(frozen=True)
class Files:
    """Where the reference starts, with its predictor and its checkpoints; and our bundle."""

    reference: Path
    bundle: Path

    @property
    def checkpoints(self) -> Path:
        """Where torch.hub keeps what LAVIS has downloaded."""
        return self.reference / "hub" / "checkpoints"

    @property
    def environment(self) -> dict[str, str]:
        """Of the reference."""
        return {"TORCH_HOME": str(self.reference), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "HF_HUB_OFFLINE": "1"}


def full_size(directory: Path, dtype: str) -> Files:
    """Write the checkpoints and build the bundle where they are not there yet."""
    files = Files(directory / "reference", directory / f"bundle-{dtype}")
    upstream = published()
    files.checkpoints.mkdir(parents=True, exist_ok=True)
    vocabulary = files.checkpoints / "vocab.txt"
    if not vocabulary.exists():
        vocabulary.write_text("".join(f"{token}\n" for token in random_vocabulary()))
    tokenizer = make_tokenizer(vocabulary)
    sized = {}
    for task, file in upstream.checkpoints.items():
        path = files.checkpoints / file.name
        if not path.exists():
            print(f"Writing {path}.", flush=True)
            partial = path.with_suffix(".partial")
            write_checkpoint(partial, task, upstream.configs[task], tokenizer, legacy=task == "match")
            partial.rename(path)
        sized[task] = replace(file, size=path.stat().st_size)
        close = file.size is not None and abs(path.stat().st_size / file.size - 1) < 0.01
        assert close, f"{path} is not of the published size"
    local = Upstream(File("vocab.txt", vocabulary.stat().st_size), sized, upstream.configs)
    finish(files, local, dtype, "stock_predict.py")
    return files


def small(directory: Path, dtype: str) -> Files:
    """The same with the checkpoints of small_upstream.py."""
    files = Files(directory / "reference", directory / f"bundle-{dtype}")
    write_upstream(files.checkpoints)
    finish(files, small_files(files.checkpoints, "small"), dtype, "small_predict.py")
    return files


def finish(files: Files, upstream: Upstream, dtype: str, predictor: str) -> None:
    """Add the reference's predictor and what it needs beside the checkpoints, and build our bundle of them."""
    tokenizer = files.reference / "bert-base-uncased"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "vocab.txt").write_bytes((files.checkpoints / "vocab.txt").read_bytes())
    (files.reference / "predict.py").write_bytes((ROOT / "benchmarks" / predictor).read_bytes())
    (files.reference / "cog.yaml").write_text('predict: "predict.py:Predictor"\n')
    build(upstream, files.bundle, dtype, print, source=files.checkpoints)


def random_vocabulary() -> list[str]:
    """30,522 tokens: single characters, the prompt's words, and numbered ones."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{one}" for one in characters)]
    tokens += "picture of the what is this".split()
    return tokens + [f"word{number}" for number in range(30_522 - len(tokens))]


def warm(*directories: Path) -> None:
    """Read every file once, so that it is in the page cache."""
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def size(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
