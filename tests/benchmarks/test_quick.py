"""Every benchmark runs, in its quick mode, and says last what a reader needs. Nothing here assumes a speed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import ROOT, START
from benchmarks.hf_environment import MissingError, hf_python

NAMES = ("coldstart", "latency", "throughput", "soak", "overload", "hostile", "pictures", "folder", "gpu")
Results = dict[str, Future[dict[str, Any]]]


def run(name: str) -> dict[str, Any]:
    """The line of JSON of a quick run."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--quick"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},  # two run at a time
        capture_output=True,
        text=True,
        timeout=START,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert (result["benchmark"], result["quick"]) == (name, True)
    assert result["cpu"] in ended.stdout
    return result


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Two run at a time: each waits for much of its time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, name) for name in NAMES}


def test_latency_compares_lavis_with_each_of_our_precisions(results: Results) -> None:
    result = results["latency"].result()
    rows = {(row["task"], row["contender"]): row for row in result["rows"]}
    assert rows.keys() >= {
        (task, name) for task in ("caption-12", "answer-4", "match") for name in ("lavis", "float32")
    }
    assert all(row["median_s"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    assert rows["caption-12", "float32"]["different"] == rows["answer-4", "float32"]["different"] == 0
    assert result["scenes"]["different"]["float32"]["caption"] == 0
    assert result["versions"]["ours"].keys() >= {"python", "torch"}


def test_coldstart_starts_the_reference_and_us_and_times_our_stages(results: Results) -> None:
    result = results["coldstart"].result()
    for figure in ("seconds", "peak_bytes", "file_bytes"):
        assert result[figure].keys() == {"reference", "ours"}
    assert "weights" in result["stages"]


def test_throughput_asks_the_plain_predictor_and_ours(results: Results) -> None:
    result = results["throughput"].result()
    cells = {(row["clients"], row["contender"]) for row in result["rows"]}
    assert cells == {(clients, name) for clients in (1, 4) for name in ("plain", "ours")}
    assert all(row["answers"] > 0 and row["lost"] == 0 for row in result["rows"])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_overload_counts_answers_and_refusals_and_looks_at_health(results: Results) -> None:
    result = results["overload"].result()
    assert result["answered"] > 0
    assert result["lost"] == result["wrong"] == 0
    assert sum(result["health_statuses"].values()) == result["health_checks"] > 0
    assert result.keys() >= {"refused_409", "health_ms", "readyz_ms", "metrics_ms", "ready_after_s"}
    assert result.keys() >= {"server_memory", "predictor_memory"}


def test_hostile_lets_every_kind_of_client_loose_and_loses_no_good_answer(results: Results) -> None:
    result = results["hostile"].result()
    assert result["hostile"] == "passed"
    assert all(told for told in result["told"].values()), "a kind of client did nothing"
    assert result["good"]["answered"] > 0
    assert result.keys() >= {"health_ms", "most_above_idle_mib", "left_percent"}


def test_pictures_compares_processes_with_threads(results: Results) -> None:
    result = results["pictures"].result()
    assert [row["picture"] for row in result["rows"]] == ["640 x 480", "4000 x 3000"]
    assert all(row["processes_ms"] > 0 and row["processes_per_s"] > 0 for row in result["rows"])


def test_folder_compares_the_program_with_the_engine_alone_and_hugging_face(results: Results) -> None:
    rows = {row["way"]: row for row in results["folder"].result()["rows"]}
    assert rows.keys() == {"engine alone", "in process", "HTTP", "Hugging Face, batch 8"}
    assert all(row["pictures_per_s"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    assert [rows[way]["different"] for way in ("engine alone", "in process", "HTTP")] == [0, 0, 0]
    assert "different" not in rows["Hugging Face, batch 8"]


def test_soak_passes_and_counts_every_outcome(results: Results) -> None:
    result = results["soak"].result()
    assert result["soak"] == "passed"
    assert result["outcomes"]["answered"] > 0
    assert result.keys() >= {"capacity_per_s", "p99_ms", "memory_growth_percent", "descriptors_after"}


def test_gpu_tries_everything_with_small_models_on_the_cpu(results: Results) -> None:
    figures = results["gpu"].result()["figures"]
    assert not [name for name in figures if name.endswith(("came no further", ": left out"))]
    for task in ("caption", "answer", "match"):
        assert figures[f"demo, 8 scenes, float32, {task}: different"] == "0.0%"
        assert figures[f"random, 16 pictures, float32, {task}: different"].startswith("0.0%")
        assert figures[f"LAVIS, float32, {task} alone [ms]"] > 0
    assert figures["memory for four: answers of sixteen that come, and are the same"] == 16
    assert figures["start to READY [s]"] > sum(value for name, value in figures.items() if "predictions of" in name) > 0
    assert figures["ours, mixed tasks through the batcher, batches of up to 4 [per s]"] > 0
    for load in ("caption", "answer", "match", "mixed"):
        assert 1 < figures[f"64 clients over HTTP, {load}: largest batch"] <= 4
        assert figures[f"64 clients over HTTP, {load}: lost"] == {}


def test_hugging_faces_blip_is_timed_as_it_is_and_compiled() -> None:
    # Our environment has an older one, so that this needs no other.
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.hf_gpu", "--small"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START, check=True)
    figures = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(figure["compiled"], figure["task"], figure["batch"]) for figure in figures] == [
        (compiled, task, 1) for compiled in (False, True) for task in ("match", "caption", "answer")
    ]
    assert all(figure["ms"] > 0 for figure in figures)


def test_an_environment_that_cannot_be_made_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingError, match=r"^there is no environment for it in .*blip-bench-hf$"):
        hf_python(make=False)
    (tmp_path / "blip-bench-hf").write_text("in the way")
    with pytest.raises(MissingError, match=r"^its environment cannot be made: .+$"):
        hf_python()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_in_one_sentence_that_there_is_none() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    sentence = "scripts/bench gpu: torch sees no GPU on this machine; try it with --dry-run-on-cpu.\n"
    assert ended.stderr == sentence
