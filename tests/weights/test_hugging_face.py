"""Models in Hugging Face's layout: a bundle of one gives what transformers' newest generate gives, token for token."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import EXAMPLES
from benchmarks.random_blip import SPECIAL
from blip import engine
from blip.errors import BundleError
from blip.pictures.pool import Pool
from blip.tasks import TASKS
from blip.weights.bundle import open_bundle
from blip.weights.load import load_models, load_tokenizer
from blip.weights.make import change, make
from blip.weights.sources import HuggingFace, find
from tests.weights.hf_oracle import Oracle, sizes

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
    clear = Image.open(EXAMPLES / "pair.jpg").convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    for name, picture in {
        "rgba.png": clear,
        "grey.png": clear.convert("LA"),
        "palette.gif": clear.quantize(64),
        "colour.png": clear.convert("RGB"),
    }.items():
        # The last has no channel for it: one colour of the picture is transparent.
        seen_through: dict[str, Any] = {"transparency": (0, 0, 0)} if name == "colour.png" else {}
        picture.save(folder / name, **seen_through)
        paths.append(folder / name)
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


def test_a_prompt_is_followed_by_as_many_tokens_as_in_transformers(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", 7, end=-9.0)
    expected, _ = oracle.run(directory, images[:2], ["a picture of the"] * 2)
    made = bundle(tmp_path / "bundle", "caption", directory, "caption.prompt=a picture of the")
    assert found(made, "caption", images[:2]) == expected
    assert {len(row) for row in expected} == {25}
    change(made, ["caption.prompt="], lambda _: None)
    expected, _ = oracle.run(directory, images[:2])
    assert found(made, "caption", images[:2]) == expected
    change(made, ["caption.max_length=9"], lambda _: None)
    change(made, ["caption.prompt=a dog"], lambda _: None)
    expected, _ = oracle.run(directory, images[:2], ["a dog"] * 2, max_length=9)
    assert found(made, "caption", images[:2]) == expected


def test_settings_of_a_search_in_the_config_are_dropped_as_transformers_does(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", 1, end=1.0)
    dropped: dict[str, Any] = {"max_length": 9, "min_length": 7, "num_beams": 4, "do_sample": True, "temperature": 3.0}
    dropped |= {"repetition_penalty": 1.7, "encoder_repetition_penalty": 1.5, "early_stopping": True}
    dropped |= {"length_penalty": 2.0, "no_repeat_ngram_size": 2, "num_return_sequences": 2, "forced_eos_token_id": 3}
    dropped |= {"suppress_tokens": [5, 9], "begin_suppress_tokens": [5], "bad_words_ids": [[6]]}
    dropped |= {"exponential_decay_length_penalty": [2, 2.0]}
    edit(directory / "config.json", text_config=dropped)
    expected, _ = oracle.run(directory, images)
    assert found(bundle(tmp_path / "bundle", "caption", directory), "caption", images) == expected


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


PIXELS = {"image_mean": [0.3, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 127}


@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json"])
def test_pixels_are_made_as_the_file_says_that_transformers_reads(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path, file: str
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption", end=1.0)
    processor = json.loads((directory / "processor_config.json").read_text())
    other = {**processor["image_processor"], "image_mean": [0.0, 0.1, 0.2]}
    if file == "processor_config.json":
        edit(directory / file, image_processor=PIXELS)
        edit(directory / "preprocessor_config.json", **other)
    else:  # the first is of an older version, in which it says nothing of pixels
        (directory / "processor_config.json").write_text(json.dumps({"processor_class": "BlipProcessor"}))
        edit(directory / file, **{**other, **PIXELS})
    expected, pixels = oracle.run(directory, images)
    made = bundle(tmp_path / "bundle", "caption", directory)
    assert found(made, "caption", images) == expected
    net = load_models(open_bundle(made), CPU, "float32")["caption"].net
    assert min(pixels) >= net.pixel_values.min() and max(pixels) <= net.pixel_values.max()
    assert net.pixel_values[0, 0].item() == pytest.approx(-0.3 / 0.2)


#: Letters, and texts in which two ways to take them apart differ; a sigma at the end of a word, say.
ODD = json.loads(Path(__file__).with_name("odd_texts.json").read_text())


@pytest.mark.parametrize(
    "options",
    [{}, {"do_lower_case": False}, {"strip_accents": False}, {"do_lower_case": False, "strip_accents": True}],
    ids=str,
)
def test_texts_are_taken_apart_as_transformers_does(oracle: Oracle, tmp_path: Path, options: dict[str, bool]) -> None:
    words = [*SPECIAL, *ODD["words"]]
    text = {**sizes()["text"], "vocab_size": len(words) + 2, "bos_token_id": len(words)}
    directory = oracle.make(tmp_path / "hf", "match", words=words, text=text)
    edit(directory / "tokenizer_config.json", **options)
    bundle(tmp_path / "bundle", "match", directory)
    tokenizer = load_tokenizer(open_bundle(tmp_path / "bundle"), "match")
    assert [tokenizer(text).input_ids for text in ODD["texts"]] == oracle.encode(directory, ODD["texts"])


def test_a_token_without_a_name_shows_in_no_text(oracle: Oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "hf", "caption")
    model = load_models(open_bundle(bundle(tmp_path / "bundle", "caption", directory)), CPU, "float32")["caption"]
    first, count, dog = (model.net.tokenizer.convert_tokens_to_ids(token) for token in ("[DEC]", "[ENC]", "dog"))
    for whole, text in ((True, "dog dog dog"), (False, "dog dog")):
        tokens = engine.Tokens([first, dog, count, dog, first, dog], whole)
        assert engine.text_of(model.net, tokens) == text


@pytest.mark.parametrize(
    "changes",
    [
        {
            "tokenizer.json": {
                "truncation": {"max_length": 6, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
            }
        },
        {"tokenizer_config.json": {"max_length": 7}},
        {"tokenizer_config.json": {"truncation": True, "model_max_length": 5}},
        {"tokenizer_config.json": {"truncation": True, "model_max_length": 10**30}},
        {
            "tokenizer.json": {
                "padding": {
                    "strategy": {"Fixed": 9},
                    "direction": "Right",
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "[PAD]",
                    "pad_to_multiple_of": None,
                }
            }
        },
    ],
    ids=str,
)
def test_texts_are_cut_as_the_tokenizer_was_saved_to(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    directory = oracle.make(tmp_path / "hf", "match", gain=1.5)
    for file, settings in changes.items():
        edit(directory / file, **settings)
    texts = (QUESTIONS * len(images))[: len(images)]
    expected, _ = oracle.run(directory, images, texts)
    made = bundle(tmp_path / "bundle", "match", directory)
    assert torch.allclose(torch.tensor(found(made, "match", images, texts)), torch.tensor(expected), atol=2e-5)


def test_a_prompt_that_the_tokenizer_would_cut_is_refused(oracle: Oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "hf", "caption")
    edit(directory / "tokenizer_config.json", max_length=5)
    made = bundle(tmp_path / "bundle", "caption", directory, "caption.prompt=a picture of")
    with pytest.raises(BundleError, match=r"caption\.prompt has 4 tokens and the model takes 3; use fewer words\.$"):
        change(made, ["caption.prompt=a picture of the"], lambda _: None)


@pytest.mark.parametrize(
    ("prompt", "more", "text"),
    [("a dog", "##s runs", "s runs"), ("a dog", ", two", ", two"), ("the", "dog ' s", "dog's"), ("", "a dog", "a dog")],
)
def test_a_caption_is_all_that_follows_the_prompt(
    oracle: Oracle, tmp_path: Path, prompt: str, more: str, text: str
) -> None:
    directory = oracle.make(tmp_path / "hf", "caption")
    made = bundle(tmp_path / "bundle", "caption", directory, f"caption.prompt={prompt}")
    net = load_models(open_bundle(made), CPU, "float32")["caption"].net
    ids = net.tokenizer.convert_tokens_to_ids(["[DEC]", *prompt.split(), *more.split(), "[SEP]"])
    assert engine.text_of(net, engine.Tokens(ids, True)) == text
    for end in range(1, len(ids)):
        assert text.startswith(engine.text_of(net, engine.Tokens(ids[:end], False)))


def test_weights_that_transformers_does_not_read_are_left_out(
    oracle: Oracle, found: Found, images: list[Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    directory = oracle.make(tmp_path / "hf", "caption", end=1.0)
    expected, _ = oracle.run(directory, images[:3])
    weights = load_file(directory / "model.safetensors")
    words = weights.pop("text_decoder.bert.embeddings.word_embeddings.weight")
    weights["text_decoder.cls.predictions.decoder.weight"] = words  # one weight under its other name
    weights |= {"text_decoder.bert.pooler.dense.bias": torch.zeros(48), "logit_scale": torch.zeros(())}
    save_file(weights, directory / "model.safetensors")
    assert found(bundle(tmp_path / "bundle", "caption", directory), "caption", images[:3]) == expected


def test_one_weight_in_two_files_is_refused(oracle: Oracle, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = oracle.make(tmp_path / "hf", "caption", shard="40KB")
    parts = sorted(directory.glob("model-*.safetensors"))
    weights = load_file(parts[0])
    save_file({**load_file(parts[1]), **weights}, parts[1])
    with pytest.raises(BundleError, match=r"has the weight .* for a second time; save the model anew\.$"):
        bundle(tmp_path / "bundle", "caption", directory)


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
        ("config.json", {"text_config": {"guidance_scale": 1.5}}, r"asks for guidance_scale 1\.5, which this server"),
        ("config.json", {"text_config": {"layer_norm_eps": 10**400}}, r"; a number above 0 is needed\.$"),
        ("config.json", {"text_config": {"max_new_tokens": 4}}, r"asks for max_new_tokens 4, which this server cannot"),
        ("config.json", {"architectures": ["a\nb"]}, r"is of a 'a\\nb'; give one of"),
        (
            "processor_config.json",
            {"image_processor": {"rescale_factor": 10**400}},
            r"rescale_factor .*; a number above 0 is needed",
        ),
        ("processor_config.json", {"image_processor": {"image_std": [1, 10**400, 1]}}, r"three numbers are needed\.$"),
        (
            "tokenizer.json",
            {"added_tokens": [{"content": "zebra", "id": 52}]},
            r"the special token 'zebra', which this",
        ),
        ("tokenizer.json", {"model": {"vocab": {"[PAD]": [0]}}}, r"has no WordPiece vocabulary, which a BLIP needs"),
        ("tokenizer.json", {"model": {"type": "BPE"}}, r"has no WordPiece vocabulary, which a BLIP needs"),
        (
            "config.json",
            {"text_config": {"bos_token_id": 10**6}},
            r"bos_token_id 1000000, which is no token's; restore",
        ),
        ("config.json", {"text_config": {"sep_token_id": 1}}, r"has sep_token_id 1, which is not \[SEP\]'s; restore"),
        ("config.json", {"text_config": 7}, r"says text hidden_size 768 and the weights have 48"),
        (
            "processor_config.json",
            {"image_processor": {"size": {"height": 20, "width": 30}}},
            r"and the model takes 30; make them the",
        ),
        ("processor_config.json", {"image_processor": {"resample": 2}}, r"has resample 2; only 3 can be followed\.$"),
        ("processor_config.json", {"image_processor": {"image_std": [1, 0, 1]}}, r"has an image_std of 0"),
        (
            "processor_config.json",
            {"image_processor": {"image_mean": "x"}},
            r"has image_mean 'x'; three numbers are needed\.$",
        ),
        (
            "processor_config.json",
            {"image_processor": {"do_center_crop": True}},
            r"has do_center_crop True; only False",
        ),
        (
            "processor_config.json",
            {"image_processor": {"do_pad": True}},
            r"has do_pad True; only False can be followed",
        ),
        ("processor_config.json", {"image_processor": {"do_resize": False}}, r"has do_resize False; only True can be"),
        ("processor_config.json", {"image_processor": 5}, r"has no settings in image_processor; restore the model"),
        (
            "processor_config.json",
            {"image_processor": {"image_processor_type": "CLIPImageProcessor"}},
            r"names the processor 'CLIPImageProcessor'; only a BlipImageProcessor",
        ),
        (
            "processor_config.json",
            {"image_processor": {"image_std": [1e-300, 1, 1]}},
            r"make pixels of any size; restore",
        ),
        (
            "tokenizer_config.json",
            {"eos_token": "dog"},
            r"the special token 'dog', which this server's tokenizer cannot",
        ),
        ("tokenizer_config.json", {"image_token": "<i>"}, r"the special token '<i>', which this server's tokenizer"),
        (
            "tokenizer_config.json",
            {"bos_token": "[DEC]"},
            r"the special token '\[DEC\]', which this server's tokenizer",
        ),
        (
            "special_tokens_map.json",
            {"bos_token": "</s>"},
            r"special_tokens_map\.json has the special token '</s>', which",
        ),
        (
            "tokenizer_config.json",
            {"split_special_tokens": True},
            r"has split_special_tokens, which this server cannot",
        ),
        ("tokenizer_config.json", {"padding": "max_length"}, r"has padding 'max_length', which this server cannot do;"),
        ("tokenizer_config.json", {"max_length": 2}, r"has max_length 2; a number from 3 is needed"),
        (
            "tokenizer_config.json",
            {"max_length": 9, "truncation_side": "left"},
            r"cuts texts by \(True, 'left'\), which",
        ),
        ("tokenizer_config.json", {"do_lower_case": None}, r"has do_lower_case None; true or false is needed"),
        ("tokenizer_config.json", {"strip_accents": 1}, r"has strip_accents 1; true or false is needed"),
        (
            "config.json",
            {"text_config": {"hidden_act": "x" * 3000}},
            r"hidden_act of 'x{56}\.\.\.; only 'gelu' is known\.$",
        ),
        ("tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}, r"names the tokenizer 'CLIPTokenizer'; only a"),
        ("tokenizer_config.json", {"cls_token": "[MASK]"}, r"the special token '\[MASK\]' as cls_token, which this"),
        ("tokenizer_config.json", {"extra_special_tokens": ["<image>"]}, r"the special token '<image>', which this"),
        ("added_tokens.json", {"dog": 9}, r"added_tokens\.json has the special token 'dog', which this server's"),
        (
            "special_tokens_map.json",
            {"unk_token": {"content": "[UNK]", "lstrip": True}},
            r"'lstrip': True} as unk_token,",
        ),
        (
            "tokenizer.json",
            {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}},
            r"does not begin a text with \[CLS\] and end it with \[SEP\]; give the model's own",
        ),
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
        (lambda path: pipe(path / "config.json"), r"config\.json is not a file; restore the model\.$"),
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


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def only_vocabulary(path: Path) -> Path:
    (path / "tokenizer.json").unlink()
    return path / "vocab.txt"


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_of_a_model_is_refused_with_its_directory(oracle: Oracle, tmp_path: Path, name: str) -> None:
    directory = oracle.make(tmp_path / "hf", "match")
    (directory / name).touch()
    with pytest.raises(BundleError, match=rf"{name} is a part of a model; give its directory, {directory}\.$"):
        find("match", str(directory / name))


def test_a_model_for_another_task_is_refused_with_the_right_option(oracle: Oracle, tmp_path: Path) -> None:
    directory = oracle.make(tmp_path / "hf", "match")
    with pytest.raises(BundleError, match=r"is of a 'BlipForImageTextRetrieval'; give it with --match\.$"):
        bundle(tmp_path / "bundle", "answer", directory)
