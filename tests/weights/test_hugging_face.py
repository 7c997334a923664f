"""Models in Hugging Face's layout: a bundle of one gives what transformers' newest generate gives, token for token."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import EXAMPLES
from blip import engine
from blip.errors import BundleError
from blip.pictures.pool import Pool
from blip.tasks import TASKS
from blip.weights.bundle import open_bundle
from blip.weights.load import load_models
from blip.weights.make import change, make
from blip.weights.sources import HuggingFace
from tests.weights.hf_oracle import Oracle

CPU = torch.device("cpu")
QUESTIONS = [
    "What colour is the dog?",
    "how many dogs run on it, and what is above the red circle",
    "Is this a SURFBOARD",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of many sizes, larger and smaller than the model's."""
    folder = tmp_path_factory.mktemp("images")
    paths = sorted(EXAMPLES.glob("*.jpg"))[:3]
    generator = np.random.default_rng(0)
    for index, (width, height) in enumerate([(640, 427), (31, 30), (30, 30), (7, 200), (333, 90), (1000, 1500)]):
        side = 200 if index % 2 else 8  # fine noise, or coarse squares
        squares = Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8))
        path = folder / f"{index}.png"
        squares.resize((width, height), Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    running = Pool()
    running.wait()
    yield running
    running.close()


Found = Callable[..., list[Any]]


@pytest.fixture
def found(pool: Pool) -> Found:
    """`found(bundle, task, images, texts)`: what the server's own parts find, in float32."""

    def found(path: Path, name: str, images: list[Path], texts: list[str] | None = None) -> list[Any]:
        model = load_models(open_bundle(path), CPU, "float32")[name]
        task = next(task for task in TASKS if task.bundle_name == name)(model)

        async def pixels() -> list[bytearray]:
            return [await pool.pixels(image, model.image_size, model.library) for image in images]

        pictures = asyncio.run(pixels())
        samples = [
            task.prepare(picture, text) for picture, text in zip(pictures, texts or [""] * len(images), strict=True)
        ]
        together = task.run(samples)
        alone = [task.run([sample])[0] for sample in samples]
        assert together == alone
        return [each.ids if isinstance(each, engine.Tokens) else each for each in alone]

    return found


def bundle(path: Path, task: str, directory: Path, *changes: str) -> Path:
    make(path, {task: HuggingFace(task, directory)}, "float32", lambda _: None)
    if changes:
        change(path, changes, lambda _: None)
    return path


SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "max_length": 20},
    {"num_beams": 5, "max_length": 12, "min_length": 6},
    {"num_beams": 1, "max_length": 30, "min_length": 10},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_captions_are_those_of_transformers(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path, seed: int, search: dict[str, Any]
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", seed, end=float(seed))
    expected, _ = oracle.run(directory, images, None, **search)
    made = bundle(
        tmp_path / "bundle", "caption", directory, *(f"caption.{name}={value}" for name, value in search.items())
    )
    assert found(made, "caption", images) == expected
    assert len({str(row) for row in expected}) > 1


@pytest.mark.parametrize("beams", [1, 4])
def test_captions_with_a_prompt_are_those_of_transformers(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path, beams: int
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", 7, end=1.0)
    expected, _ = oracle.run(directory, images, ["a picture of the"] * len(images), num_beams=beams, max_length=16)
    made = bundle(
        tmp_path / "bundle",
        "caption",
        directory,
        *("caption.prompt=a Picture of  the", f"caption.num_beams={beams}", "caption.max_length=16"),
    )
    assert found(made, "caption", images) == expected


@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_answers_are_those_of_transformers(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path, seed: int, search: dict[str, Any]
) -> None:
    directory = oracle.make(tmp_path / "hf", "answer", seed, end=2.0)
    questions = (QUESTIONS * len(images))[: len(images)]
    expected, _ = oracle.run(directory, images, questions, **search)
    made = bundle(
        tmp_path / "bundle", "answer", directory, *(f"answer.{name}={value}" for name, value in search.items())
    )
    assert found(made, "answer", images, questions) == expected


def test_matches_are_those_of_transformers(oracle: Oracle, found: Found, images: list[Path], tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "hf", "match", gain=1.5)
    texts = (QUESTIONS * len(images))[: len(images)]
    expected, _ = oracle.run(directory, images, texts)
    made = bundle(tmp_path / "bundle", "match", directory)
    assert torch.allclose(torch.tensor(found(made, "match", images, texts)), torch.tensor(expected), atol=2e-5)


def test_pixels_are_those_of_its_processor_bit_for_bit(
    oracle: Oracle, images: list[Path], tmp_path: Path, pool: Pool
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption")
    model = load_models(open_bundle(bundle(tmp_path / "bundle", "caption", directory)), CPU, "float32")["caption"]
    for image in images:
        _, expected = oracle.run(directory, [image])
        pixels = torch.frombuffer(asyncio.run(pool.pixels(image, 30, "transformers")), dtype=torch.uint8)
        normalised = engine.encoders.normalise(model.net.pixel_values, pixels.view(1, 30, 30, 3))
        assert torch.equal(normalised.flatten(), torch.tensor(expected)), image


@pytest.mark.parametrize("changes", [{"shard": "40KB"}, {"half": True}], ids=str)
def test_weights_in_parts_and_in_half_precision_are_read(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", end=1.0, **changes)
    expected, _ = oracle.run(directory, images[:3])
    assert found(bundle(tmp_path / "bundle", "caption", directory), "caption", images[:3]) == expected


def test_an_old_directory_with_a_pickle_and_only_a_vocabulary_is_read(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    directory = oracle.make(tmp_path / "hf", "caption", end=1.0)
    expected, _ = oracle.run(directory, images[:3])
    weights = directory / "model.safetensors"
    torch.save(load_file(weights), directory / "pytorch_model.bin")
    for path in (weights, directory / "tokenizer.json", directory / "tokenizer_config.json"):
        path.unlink()
    preprocessor = (
        json.loads((directory / "preprocessor_config.json").read_text())
        if (directory / "preprocessor_config.json").is_file()
        else {}
    )
    (directory / "preprocessor_config.json").write_text(json.dumps({**preprocessor, "size": 30}))
    assert found(bundle(tmp_path / "bundle", "caption", directory), "caption", images[:3]) == expected


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            content[name] |= value
        else:
            content[name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("config.json", {"model_type": "blip-2"}, r"is of a 'blip-2' model and not of a BLIP; give a BLIP\.$"),
        ("config.json", {"model_type": ["clip"]}, r"is of a \['clip'\] model and not of a BLIP"),
        ("config.json", {"architectures": ["BlipModel"]}, r"is of a 'BlipModel'; give one of BlipForCond"),
        ("config.json", {"architectures": ["BlipForQuestionAnswering"]}, r"; give it with --answer\.$"),
        ("config.json", {"text_config": {"hidden_size": 64}}, r"says text hidden_size 64 and the weights have 48"),
        ("config.json", {"text_config": {"num_hidden_layers": 10**9}}, r"text num_hidden_layers 1000000000 and the"),
        ("config.json", {"vision_config": {"image_size": 60}}, r"says vision image_size 60 and the weights have 30"),
        ("config.json", {"text_config": {"hidden_act": "relu"}}, r"has a text hidden_act of 'relu'; only 'gelu'"),
        ("config.json", {"text_config": {"num_attention_heads": 7}}, r"text width of 48, which 7 heads cannot share"),
        ("config.json", {"text_config": {"num_attention_heads": 0}}, r"num_attention_heads 0; a whole number from 1"),
        ("config.json", {"text_config": {"layer_norm_eps": "x"}}, r"has layer_norm_eps 'x'; a number above 0"),
        ("config.json", {"text_config": {"repetition_penalty": 1.5}}, r"repetition_penalty 1\.5, which this server"),
        ("config.json", {"text_config": {"layer_norm_eps": 10**400}}, r"; a number above 0 is needed\.$"),
        ("config.json", {"text_config": {"max_new_tokens": 4}}, r"asks for max_new_tokens 4, which this server cannot"),
        ("config.json", {"architectures": ["a\nb"]}, r"is of a 'a\\nb'; give one of"),
        ("preprocessor_config.json", {"rescale_factor": 10**400}, r"rescale_factor .*; a number above 0 is needed"),
        ("preprocessor_config.json", {"image_std": [1, 10**400, 1]}, r"three numbers are needed\.$"),
        ("tokenizer.json", {"added_tokens": [{"content": "zebra", "id": 52}]}, r"the added token 'zebra', which this"),
        ("tokenizer.json", {"model": {"vocab": {"[PAD]": [0]}}}, r"has no WordPiece vocabulary, which a BLIP needs"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"has no WordPiece vocabulary, which a BLIP needs"),
        ("config.json", {"text_config": {"max_length": 10**6}}, r"max_length=1000000 is beyond the model"),
        ("config.json", {"text_config": {"bos_token_id": 10**6}}, r"bos_token_id 1000000, which is no token's\.$"),
        ("config.json", {"text_config": {"sep_token_id": 1}}, r"has sep_token_id 1, which is not \[SEP\]'s\.$"),
        ("config.json", {"text_config": 7}, r"says text hidden_size 768 and the weights have 48"),
        ("preprocessor_config.json", {"size": {"height": 20, "width": 30}}, r"and the model takes 30; make them the"),
        ("preprocessor_config.json", {"resample": 2}, r"has resample 2; only 3 can be followed\.$"),
        ("preprocessor_config.json", {"image_std": [1, 0, 1]}, r"has an image_std of 0"),
        ("preprocessor_config.json", {"image_mean": "x"}, r"has image_mean 'x'; three numbers are needed\.$"),
        ("tokenizer_config.json", {"do_lower_case": "yes"}, r"has do_lower_case 'yes'; true or false is needed"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence_that_names_the_file(
    oracle: Oracle, tmp_path: Path, file: str, changes: dict[str, Any], sentence: str
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption")
    edit(directory / file, **changes)
    with pytest.raises(BundleError, match=sentence) as error:
        bundle(tmp_path / "bundle", "caption", directory)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: (path / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda path: (path / "config.json").write_text("[" * 10**6), r"config\.json is not valid JSON"),
        (lambda path: (path / "config.json").unlink(), r"config\.json cannot be read \(No such file"),
        (lambda path: (path / "model.safetensors").unlink(), r"has no model\.safetensors and no pytorch_model\.bin"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 99), r"is not a readable safetensors file"),
        (lambda path: truncate(path / "model.safetensors"), r"is not a readable safetensors file"),
        (lambda path: only_vocabulary(path).write_text("the\ndog\n"), r"vocab\.txt lacks the token \[PAD\]"),
        (lambda path: only_vocabulary(path).write_bytes(b"\xff"), r"vocab\.txt is not UTF-8; give the model's own"),
        (lambda path: add(only_vocabulary(path), "dog\n"), r"has the token 'dog' twice, in two lines or damaged"),
        (lambda path: add(only_vocabulary(path), "x\ny\nz\n"), r"has \d+ tokens and the model \d+; give the model's"),
        (lambda path: only_vocabulary(path).unlink(), r"has neither vocab\.txt nor tokenizer\.json; add the model's"),
    ],
)
def test_damaged_files_are_one_sentence(
    oracle: Oracle, tmp_path: Path, spoil: Callable[[Path], object], sentence: str
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption")
    spoil(directory)
    with pytest.raises(BundleError, match=sentence):
        bundle(tmp_path / "bundle", "caption", directory)
    assert not (tmp_path / "bundle").exists()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_vocabulary(path: Path) -> Path:
    (path / "tokenizer.json").unlink()
    return path / "vocab.txt"


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_a_model_for_another_task_is_refused_with_the_right_option(oracle: Oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "hf", "match")
    with pytest.raises(BundleError, match=r"is of a 'BlipForImageTextRetrieval'; give it with --match\.$"):
        bundle(tmp_path / "bundle", "answer", directory)
