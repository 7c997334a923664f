"""Building and filling LAVIS's models from the demo bundle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blip.config import DEMO
from blip.device import choose_device
from blip.engine.graphs import Recorder
from blip.engine.model import Model
from blip.errors import BundleError, ConfigError
from blip.lavis import build, fill
from blip.weights.bundle import Bundle, open_bundle
from blip.weights.load import load_models, load_tokenizer, with_graphs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return open_bundle(DEMO)


def test_every_parameter_is_filled_and_nothing_is_left_on_the_meta_device(demo: Bundle) -> None:
    for model in load_models(demo, CPU, "float32").values():
        tensors = [*model.net.parameters(), *model.net.buffers()]
        assert {(tensor.device.type, tensor.requires_grad) for tensor in tensors} == {("cpu", False)}
        assert not model.net.training


def filled(demo: Bundle, task: str) -> Any:
    net = build(task, demo.config(task), load_tokenizer(demo, task))
    fill(net, demo.tensors(task), CPU, torch.float32, where="the-file")
    return net


@pytest.mark.parametrize("task", ["caption", "answer"])
def test_the_output_weight_of_a_decoder_stays_tied_to_its_word_embeddings(demo: Bundle, task: str) -> None:
    decoder = filled(demo, task).text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    assert decoder.cls.predictions.decoder.bias is decoder.cls.predictions.bias


def test_the_weights_are_those_of_the_bundle(demo: Bundle) -> None:
    net, tensors = filled(demo, "match"), demo.tensors("match")
    assert torch.equal(net.itm_head.weight, tensors["itm_head.weight"].float())
    assert torch.equal(net.visual_encoder.pos_embed, tensors["visual_encoder.pos_embed"].float())


def lose(tensors: dict[str, Tensor]) -> None:
    del tensors["itm_head.bias"]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["image_queue"] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["itm_head.weight"] = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lose, r"the-file lacks the tensor itm_head\.bias; restore the bundle\."),
        (add, r"the-file holds the tensor image_queue, which the model does not use; restore the bundle\."),
        (reshape, r"the-file has the tensor itm_head\.weight with shape \[3, 4\] instead of \[2, \d+\]; restore"),
    ],
)
def test_missing_unused_and_misshapen_tensors_are_refused_by_file_and_key(
    demo: Bundle, spoil: Callable[[dict[str, Tensor]], None], sentence: str
) -> None:
    tensors = demo.tensors("match")
    spoil(tensors)
    net = build("match", demo.config("match"), load_tokenizer(demo, "match"))
    with pytest.raises(BundleError, match=sentence):
        fill(net, tensors, CPU, torch.float32, where="the-file")


def test_cuda_that_is_asked_for_and_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"^BLIP_DEVICE=cuda and CUDA does not work here: "):
        choose_device("cuda")


def test_an_automatic_device_falls_back_to_the_cpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == CPU
    assert capsys.readouterr().out.startswith("CUDA does not work here, using the CPU: ")


def test_a_bundle_directory_is_opened_where_it_is(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"There is no weights bundle at .*: manifest\.json is missing; set BLIP_W"):
        open_bundle(tmp_path)


def refuse(*_: object) -> bool:
    return False


def fail(*_: object) -> bool:
    raise RuntimeError("CUDA error: out of luck\nMore about it.")


@pytest.mark.parametrize(
    ("agrees", "reason"), [(refuse, "the search on this device chooses other words"), (fail, "CUDA error: out of luck")]
)
def test_where_the_search_is_not_proven_nothing_has_graphs_and_one_line_says_why(
    demo: Bundle, agrees: Callable[..., bool], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models = load_models(demo, CPU, "float32")
    capsys.readouterr()
    assert with_graphs(models, 2, lambda work: work, agrees) == models
    assert capsys.readouterr().out == f"Everything runs without CUDA graphs: {reason}.\n"


def test_graphs_are_recorded_for_the_largest_pictures_first_and_the_tasks_keep_their_order(demo: Bundle) -> None:
    models = load_models(demo, CPU, "float32")
    order: list[int] = []

    class Recorded(Model):
        def with_graphs(self, max_batch: int, record: Recorder) -> Model:  # noqa: ARG002
            order.append(self.image_size)
            return self

    sizes = {"caption": 384, "answer": 480, "match": 384}
    for task, model in models.items():
        models[task] = Recorded(**{**vars(model), "image_size": sizes[task]})
    assert list(with_graphs(models, 1, lambda work: work)) == list(models)
    assert order == [480, 384, 384]
