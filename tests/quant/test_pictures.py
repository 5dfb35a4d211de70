"""The workload of a few-step bundle: parts are watched, replaced and disturbed on the deployed trajectory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.store import Bundle
from edgekit.quant.metrics import CONTENT, NSR, QUALITY, errors, metrics_for
from edgekit.quant.pictures import CallsWorkload, PictureWorkload, denoisers, joined
from edgekit.runtime.backends import Binding, Session, open_session
from edgekit.runtime.diffusion.pipeline import DrawRequest, FewStepPipeline
from tests.bundle import tiny
from tests.quant.small_bundle import SIDE, text_encoder

REQUESTS = tuple(DrawRequest(prompt=prompt, batch=2, seed=seed) for seed, prompt in enumerate(("red apple", "pear")))
STEPS = 2
Arrays = Mapping[str, np.ndarray]


class Wrapped:
    """A session whose answers a test may change."""

    def __init__(self, inner: Session) -> None:
        self.inner, self.runs = inner, 0
        self.device, self.inputs, self.outputs = inner.device, inner.inputs, inner.outputs

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        self.runs += 1
        return self.changed(self.inner.run(feeds))

    def changed(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return outputs

    def bind(self) -> Binding:
        return self.inner.bind()


class NoisyAtTheEnd(Wrapped):
    """A little noise in the last step of every request."""

    def __init__(self, inner: Session) -> None:
        super().__init__(inner)
        self.random = np.random.default_rng(11)
        self.before: list[np.ndarray] = []
        self.after: list[np.ndarray] = []

    def changed(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (name,) = outputs
        if self.runs % STEPS:
            return outputs
        noise = self.random.standard_normal(outputs[name].shape, dtype=np.float32)
        self.before.append(outputs[name])
        self.after.append(outputs[name] + 0.01 * noise)
        return {name: self.after[-1]}


@pytest.fixture(scope="module")
def workload(small_bundle: Bundle) -> PictureWorkload:
    return PictureWorkload(small_bundle, REQUESTS, threads=1)


def opened(bundle: Bundle, part: str) -> Session:
    return open_session(bundle.graph(part), threads=1)


def other_encoder(folder: Path) -> Session:
    """Other words, other weights."""
    tiny.save(text_encoder(seed=1), folder / "other.onnx")
    return open_session(folder / "other.onnx", threads=1)


def test_samples_are_those_that_the_runtime_draws(small_bundle: Bundle, workload: PictureWorkload) -> None:
    """The reference is the finished latents, and `draw` goes on to the pictures."""
    with FewStepPipeline(small_bundle, threads=1) as pipeline:
        drawn = [pipeline.generate(each.prompt, batch=2, seed=each.seed) for each in REQUESTS]
    for sample, result, picture in zip(workload.reference, drawn, workload.draw({}), strict=True):
        assert sample.shape == (2, 4, SIDE, SIDE)
        np.testing.assert_allclose(sample, result.latents, atol=1e-5)
        assert [np.asarray(image).tolist() for image in picture.images] == [
            np.asarray(image).tolist() for image in result.images
        ]
    assert workload.metrics == (CONTENT, QUALITY)


def test_a_replaced_part_changes_the_sample(small_bundle: Bundle, workload: PictureWorkload, tmp_path: Path) -> None:
    """The same graph changes nothing, another one does, and afterwards all is as before."""
    same = Wrapped(opened(small_bundle, "unet"))
    for sample, reference in zip(workload.run({"unet": same}), workload.reference, strict=True):
        np.testing.assert_allclose(sample, reference, atol=1e-5)
    assert same.runs == STEPS * len(REQUESTS)
    changed = workload.run({"text_encoder": other_encoder(tmp_path)})
    assert errors((NSR,), workload.reference, changed)["nsr"] > 1e-4
    for sample, reference in zip(workload.run({}), workload.reference, strict=True):
        np.testing.assert_array_equal(sample, reference)


def test_every_run_of_a_part_is_recorded(small_bundle: Bundle, workload: PictureWorkload) -> None:
    """Each step of the denoiser, each prompt of the encoder; the decoder only if all of the way is asked for."""
    parts = ("text_encoder", "unet", "vae_decoder")
    calls = workload.record(parts)
    assert [len(calls[part]) for part in parts] == [2, 2 * STEPS, 0]
    times = [float(call.feeds["timestep"][0]) for call in calls["unet"]]
    (table,) = [table for table in small_bundle.manifest.tables if table.steps == STEPS]
    assert times == pytest.approx([row[0] for row in table.rows] * len(REQUESTS))
    session = opened(small_bundle, "unet")
    for call in calls["unet"]:
        np.testing.assert_allclose(session.run(call.feeds)["out_sample"], call.outputs["out_sample"], atol=1e-5)
    whole = workload.record(parts, whole=True)
    assert [len(whole[part]) for part in parts] == [2, 2 * STEPS, 2]


def test_what_follows_a_replaced_part_is_recorded_as_it_then_is(workload: PictureWorkload, tmp_path: Path) -> None:
    """The denoiser is fed what the other encoder says."""
    other = other_encoder(tmp_path)
    both = workload.record(["text_encoder", "unet"])
    replaced = workload.record(["unet"], replaced={"text_encoder": other})["unet"]
    said = [other.run(call.feeds)["last_hidden_state"] for call in both["text_encoder"]]
    for number, call in enumerate(replaced):
        text = call.feeds["encoder_hidden_states"]
        np.testing.assert_allclose(text, np.broadcast_to(said[number // STEPS], text.shape), rtol=1e-4, atol=1e-4)
        assert not np.allclose(text, both["unet"][number].feeds["encoder_hidden_states"])


def test_the_gain_of_the_last_step_is_that_of_an_error_put_in_by_hand(
    small_bundle: Bundle, workload: PictureWorkload
) -> None:
    """After the last run all is linear, so other noise of other strength gives the same ratio, to its own chance."""
    gains = workload.gains("unet")
    assert len(gains) == STEPS
    assert all(gain.keys() == {"content", "quality"} for gain in gains)
    noisy = NoisyAtTheEnd(opened(small_bundle, "unet"))
    end = errors(workload.metrics, workload.reference, workload.run({"unet": noisy}))
    start = errors(metrics_for(noisy.before), noisy.before, noisy.after)
    for name, gain in gains[-1].items():
        assert gain == pytest.approx(end[name] / start[name], rel=0.2), name
    assert workload.gains("unet") == gains, "the same noise every time"


def test_what_a_replacement_leaves_in_the_sample(workload: PictureWorkload, tmp_path: Path) -> None:
    """Its error there over its error here, each by the metrics that fit; nothing where it makes none."""
    other = other_encoder(tmp_path)
    calls = workload.record(["text_encoder"])["text_encoder"]
    answers = [other.run(call.feeds)["last_hidden_state"] for call in calls]
    start = errors((NSR,), [call.outputs["last_hidden_state"] for call in calls], answers)["nsr"]
    end = errors(workload.metrics, workload.reference, workload.run({"text_encoder": other}))
    assert workload.carried("text_encoder", other) == pytest.approx({name: end[name] / start for name in end})


def test_other_requests_share_the_sessions(small_bundle: Bundle, workload: PictureWorkload) -> None:
    """The workload of other requests gives what one of its own would, and the first is as it was, closed in between."""
    other = workload.of(REQUESTS[1:])
    np.testing.assert_allclose(other.reference[0], workload.reference[1], atol=1e-6)
    assert len(other.run({})) == 1
    workload.release()
    for sample, reference in zip(workload.run({}), workload.reference, strict=True):
        np.testing.assert_allclose(sample, reference, atol=1e-6)


def test_recorded_runs_are_a_workload_of_their_own(small_bundle: Bundle, workload: PictureWorkload) -> None:
    """A part is compared with its own answers, by the sample's metrics where they fit and by `nsr` where not."""
    calls = workload.record(["vae_decoder", "text_encoder"], whole=True)
    decoder = CallsWorkload("vae_decoder", calls["vae_decoder"], ["content", "quality"])
    assert decoder.metrics == (CONTENT, QUALITY)
    assert CallsWorkload("vae_decoder", calls["vae_decoder"], ["nsr"]).metrics == (NSR,)
    assert CallsWorkload("text_encoder", calls["text_encoder"], ["content", "quality"]).metrics == (NSR,)
    again = decoder.run({"vae_decoder": opened(small_bundle, "vae_decoder")})
    assert max(errors(decoder.metrics, decoder.reference, again).values()) < 1e-9
    assert decoder.run({"unet": opened(small_bundle, "unet")}) == decoder.reference
    for answer, call in zip(decoder.reference, calls["vae_decoder"], strict=True):
        np.testing.assert_array_equal(answer, call.outputs["sample"])


def test_several_answers_are_one_array() -> None:
    """Floats beside each other, flattened; integers and guards are no part of the answer."""
    one = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    two = np.array([[7.0], [8.0]], np.float32)
    assert joined({"a": one, "ids": np.arange(2), "guard.text": np.float32(0)}) is one
    np.testing.assert_array_equal(joined({"a": one, "b": two}), [[0, 1, 2, 3, 4, 5, 7], [6, 7, 8, 9, 10, 11, 8]])


def test_the_denoisers_are_those_of_the_main_stage(small_bundle: Bundle) -> None:
    """Errors of the UNet add up over steps; what comes before and after does not run in them."""
    assert denoisers(small_bundle) == ("unet",)
