"""The first text token set aside: found by its numbers, exact in float, and what it does for eight bits."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest
from edgekit.quant.graph import Unit, find_units, initializer
from edgekit.quant.insert import Inserter
from edgekit.quant.rewrite import ConstantRows, find_constant_rows, split_bos, split_rows
from tests.quant.tiny_graphs import (
    CHANNELS,
    TOKENS,
    WIDTH,
    keys_and_values,
    normal_form,
    prompts,
    relative,
    run,
    tiny_unet,
    two_texts,
    unet_feeds,
)

TEXT = "encoder_hidden_states"
NONE = ConstantRows((), np.zeros((0, WIDTH), np.float32))
FRAMES = [  # a video's text, once per frame
    ("Unsqueeze", (np.array([1]),), {}),
    ("Expand", (np.array([1, 3, 1, 1]),), {}),
    ("Reshape", (np.array([-1, TOKENS, WIDTH]),), {}),
]


def plain_search(samples: list[np.ndarray]) -> tuple[int, ...]:
    """The slow twin: every set of rows that are the same everywhere and stand out over all the others; the largest."""
    prompts = [prompt for each in samples for prompt in each]
    tokens = len(prompts[0])
    same = [row for row in range(tokens) if all(np.array_equal(p[row], prompts[0][row]) for p in prompts)]
    best: tuple[int, ...] = ()
    for code in range(2 ** len(same)):
        chosen = tuple(row for bit, row in enumerate(same) if code >> bit & 1)
        rest = max((abs(x) for p in prompts for row in range(tokens) if row not in chosen for x in p[row]), default=0)
        stands_out = all(max(abs(x) for x in prompts[0][row]) > 4 * rest for row in chosen)
        if stands_out and len(chosen) > len(best) and len(chosen) < tokens:
            best = chosen
    return best


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    peaks=st.lists(st.sampled_from([0.5, 1.0, 3.0, 12.0, 50.0]), min_size=5, max_size=5),
    same=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_rows_are_found_as_the_definition_says(seed: int, peaks: list[float], same: list[bool]) -> None:
    """For any pattern of constant and large rows the search gives what trying every set of rows gives."""
    random = np.random.default_rng(seed)
    text = random.uniform(-1, 1, (3, 5, 4)).astype(np.float32)
    text[:, :, 0] = 1
    text[:, same] = text[0, same]
    text *= np.array(peaks, np.float32)[:, None]
    if all(same):
        assert find_constant_rows([text]).rows == ()
    else:
        found = find_constant_rows([text[:1], text[1:]])
        assert found.rows == plain_search([text])
        assert np.array_equal(found.values, text[0, list(found.rows)])


def test_a_row_that_moves_is_not_constant() -> None:
    """One prompt whose first token differs by a thousandth is enough; rounding of another kernel is not."""
    text = prompts(4)
    assert find_constant_rows([text]).rows == (0,)
    text[2, 0] *= 1 + 1e-6
    assert find_constant_rows([text]).rows == (0,)
    text[2, 0] *= 1 + 1e-3
    assert find_constant_rows([text]).rows == ()


def test_a_row_that_is_not_large_is_left_in() -> None:
    """Two times larger is what one scale can bear."""
    assert find_constant_rows([prompts(4, larger=2.0)]).rows == ()


def test_what_says_nothing_of_the_encoder_is_left_out() -> None:
    """Zeros of an empty negative prompt are no prompt, and one prompt many times tells nothing of what is constant."""
    text = prompts(3)
    assert find_constant_rows([np.zeros_like(text), text]).rows == (0,)
    assert find_constant_rows([text[:1], text[:1]]).rows == ()
    assert find_constant_rows([text[:1]]).rows == find_constant_rows([]).rows == ()


def test_prompts_may_differ_in_length() -> None:
    """The rows all prompts have are compared; what the longer ones have besides counts as the rest."""
    short, long = prompts(2, tokens=4), prompts(2, tokens=6, seed=1)
    assert find_constant_rows([short, long]).rows == (0,)
    long[:, 5] *= 40
    assert find_constant_rows([short, long]).rows == ()


@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3, 4), (2, 3, 5)]])
def test_only_texts_of_one_width_are_searched(shapes: list[tuple[int, ...]]) -> None:
    """Another rank or a second width is refused, and named."""
    with pytest.raises(BadRequest, match="of one width"):
        find_constant_rows([np.ones(shape, np.float32) for shape in shapes])


@pytest.mark.parametrize("batch", [1, 3])
def test_the_split_graph_computes_the_same(batch: int) -> None:
    """On random weights, to 1e-5, at any batch; the guard is an output more and says 0."""
    model, feeds = normal_form(tiny_unet()), unet_feeds(prompts(batch))
    before = run(model, feeds)["out_sample"]
    done = split_bos(model, find_units(model), TEXT, find_constant_rows([prompts(4)]))
    after = run(model, feeds)
    assert [(each.kind, each.node, each.input) for each in done] == [
        ("bos", "node.to_k", TEXT),
        ("bos", "node.to_v", TEXT),
    ]
    assert relative(after["out_sample"], before) < 1e-5
    assert after[f"guard.{TEXT}"].shape == ()
    assert after[f"guard.{TEXT}"] < 1e-6


def test_units_and_shapes_stay_what_they_were() -> None:
    """The same ids and roles; a product now has one row less, and what reads it as many as before."""
    model = normal_form(tiny_unet())
    before = find_units(model)
    split_bos(model, before, TEXT, find_constant_rows([prompts(2)]))
    after = find_units(model)
    assert [(unit.id, unit.role, unit.n, unit.k) for unit in after] == [(u.id, u.role, u.n, u.k) for u in before]
    (key,) = (node for node in model.graph if node.name == "node.to_k")
    sizes = [dim if isinstance(dim, int) else dim.value for dim in key.outputs[0].shape]
    assert (key.inputs[0].name, sizes) == (f"{TEXT}.rest", ["batch", TOKENS - 1, CHANNELS])
    (joined,) = (node for node, _ in key.outputs[0].uses())
    sizes = [dim if isinstance(dim, int) else dim.value for dim in joined.outputs[0].shape]
    assert (joined.outputs[0].name, sizes) == ("to_k", ["batch", TOKENS, CHANNELS])


def test_guidance_batches_and_zeros_are_exact_too() -> None:
    """An entry of zeros, as fed for an empty negative prompt, has no first token; beside it a prompt has its own."""
    text = prompts(4)
    text[:2] = 0
    model, feeds = normal_form(tiny_unet()), unet_feeds(text)
    before = run(model, feeds)["out_sample"]
    split_bos(model, find_units(model), TEXT, find_constant_rows([text]))
    after = run(model, feeds)
    assert relative(after["out_sample"], before) < 1e-5
    assert after[f"guard.{TEXT}"] < 1e-6


@pytest.mark.parametrize(
    ("chain", "options"),
    [
        ([("Identity", (), {})], {}),
        (FRAMES, {}),
        ([("Cast", (), {"to": ir.DataType.FLOAT.value})], {}),
        ([], {"text": ("batch", "length", WIDTH)}),
        ([], {"text": (2, TOKENS, WIDTH)}),
        ([], {"opset": 13}),
        ([], {"dtype": np.float16}),
    ],
    ids=["identity", "frames", "cast", "dynamic", "fixed", "opset-13", "half"],
)
def test_texts_reach_the_products_in_many_ways(chain: Any, options: dict[str, Any]) -> None:
    """Repeated for frames, cast, of free or fixed length, in half precision: the same numbers, a still guard."""
    model = keys_and_values(chain, **options)
    dtype = options.get("dtype", np.float32)
    text = prompts(2).astype(dtype)
    query = np.random.default_rng(0).standard_normal((6 if chain is FRAMES else 2, 4, CHANNELS)).astype(dtype)
    before = run(model, {"query": query, "text": text})["out"]
    done = split_bos(model, find_units(model), "text", find_constant_rows([text]))
    after = run(model, {"query": query, "text": text})
    assert len(done) == 2
    assert relative(after["out"], before) < (1e-5 if dtype == np.float32 else 4e-3)
    assert after["guard.text"] < 1e-6
    assert after["guard.text"].dtype == np.float32


def test_half_precision_does_not_wake_the_guard() -> None:
    """Constants found in float32, fed in half: the rounding stays below the guard's limit."""
    model = keys_and_values(dtype=np.float16)
    text = prompts(2)
    split_bos(model, find_units(model), "text", find_constant_rows([text]))
    query = np.zeros((2, 4, CHANNELS), np.float16)
    assert 0 < run(model, {"query": query, "text": text.astype(np.float16)})["guard.text"] < 5e-4


@pytest.mark.parametrize(
    "chain",
    [
        [("Transpose", (), {"perm": [0, 2, 1]}), ("Transpose", (), {"perm": [0, 2, 1]})],
        [("Slice", (np.array([1]), np.array([4]), np.array([1])), {})],
        [("Tanh", (), {})],
    ],
    ids=["transposed", "sliced", "activated"],
)
def test_other_ways_are_left_alone(chain: Any) -> None:
    """Where rows may not be tokens any more, or are of other numbers, nothing changes."""
    model = keys_and_values(chain)
    before = ir.to_proto(model).SerializeToString()
    assert split_bos(model, find_units(model), "text", find_constant_rows([prompts(2)])) == ()
    assert ir.to_proto(model).SerializeToString() == before


def test_nothing_changes_where_nothing_stands_out() -> None:
    """No constant rows, an input of another name, or no key or value among the units: the graph is as it was."""
    model = normal_form(tiny_unet())
    units, rows = find_units(model), find_constant_rows([prompts(2)])
    before = ir.to_proto(model).SerializeToString()
    assert split_bos(model, units, TEXT, NONE) == ()
    assert split_bos(model, units, "sample", rows) == split_bos(model, units, "nowhere", rows) == ()
    assert split_bos(model, [unit for unit in units if unit.role != "cross_kv"], TEXT, rows) == ()
    assert ir.to_proto(model).SerializeToString() == before


@settings(deadline=None, max_examples=12)
@given(rows=st.integers(1, TOKENS - 1), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_several_leading_rows_split_exactly(rows: int, batch: int, seed: int) -> None:
    """A prefix of any length but the whole."""
    text = prompts(3, seed=seed)
    text[:, 1:rows] = text[:1, :1] * np.linspace(0.5, 1, rows - 1)[None, :, None]
    found = find_constant_rows([text])
    assert found.rows == tuple(range(rows))
    model = keys_and_values(seed=seed)
    feeds = {
        "query": np.random.default_rng(seed).standard_normal((batch, 4, CHANNELS)).astype(np.float32),
        "text": text[:batch],
    }
    before = run(model, feeds)["out"]
    split_bos(model, find_units(model), "text", found)
    after = run(model, feeds)
    assert relative(after["out"], before) < 1e-5
    assert after["guard.text"] < 1e-6


@pytest.mark.parametrize(
    ("rows", "shape", "told"),
    [
        ((1,), (1, WIDTH), "only the first rows"),
        ((0, 2), (2, WIDTH), "only the first rows"),
        ((0,), (1, WIDTH + 1), "do not go with it"),
        (tuple(range(TOKENS)), (TOKENS, WIDTH), "do not go with it"),
    ],
)
def test_other_rows_are_refused(rows: tuple[int, ...], shape: tuple[int, ...], told: str) -> None:
    """Rows in the middle, of another width, or all there are."""
    model = normal_form(tiny_unet())
    with pytest.raises(BadRequest, match=told):
        split_bos(model, find_units(model), TEXT, ConstantRows(rows, np.ones(shape, np.float32)))


def test_a_second_split_and_an_old_graph_are_refused() -> None:
    """One guard per input, so all units of an input are split at once; operators of opset 12 take axes elsewhere."""
    model, rows = normal_form(tiny_unet()), find_constant_rows([prompts(2)])
    units = find_units(model)
    split_bos(model, [unit for unit in units if unit.id == "node.to_k"], TEXT, rows)
    assert split_bos(model, [unit for unit in find_units(model) if unit.id == "node.to_k"], TEXT, rows) == ()
    with pytest.raises(BadRequest, match="split already"):
        split_bos(model, units, TEXT, rows)
    old = keys_and_values()
    old.graph.opset_imports[""] = 12
    with pytest.raises(BadRequest, match="opset 12"):
        split_bos(old, find_units(old), "text", rows)


def test_the_stored_rows_are_computed_in_float64() -> None:
    """To the last bit what float64 gives: the error of the weights' own precision is all there is."""
    model, rows = normal_form(tiny_unet()), find_constant_rows([prompts(2)])
    weight = initializer(model, "to_k.1").numpy()
    split_bos(model, find_units(model), TEXT, rows)
    exact = sum(rows.values[0, j].astype(np.float64) * weight[j].astype(np.float64) for j in range(WIDTH))
    assert np.abs(initializer(model, "to_k.stored.0").numpy()[0, 0] - exact).max() < 1e-7 * np.abs(exact).max()


def test_another_first_token_wakes_the_guard() -> None:
    """By how much it differs, relative to the largest number, whatever the other tokens are."""
    model, text = normal_form(tiny_unet()), prompts(2)
    split_bos(model, find_units(model), TEXT, find_constant_rows([text]))
    largest = np.abs(text[0, 0]).max()
    text[1, 0, 5] += 0.02 * largest
    assert run(model, unet_feeds(text))[f"guard.{TEXT}"] == pytest.approx(0.02, rel=0.2)
    text[:, 0] = text[:, 1]
    assert run(model, unet_feeds(text))[f"guard.{TEXT}"] > 1e-2


def round_inputs(model: ir.Model, units: list[Unit], feeds: dict[str, np.ndarray]) -> None:
    """Give the units one scale of eight bits for their whole input, from what the input holds on these feeds."""
    nodes = {node.name: node for node in model.graph}
    for unit in units:
        node = nodes[unit.id]
        held = feeds[TEXT] if unit.data == TEXT else feeds[TEXT][:, 1:]
        scale, zero = np.float32(np.abs(held).max() / 127), np.int8(0)
        add, data = Inserter(model.graph, node), node.inputs[0]
        assert data is not None
        inputs = [np.asarray(scale), np.asarray(zero)]
        codes = add("QuantizeLinear", f"{unit.id}.codes", [data, *inputs], ir.DataType.INT8, data.shape)
        node.replace_input_with(
            0, add("DequantizeLinear", f"{unit.id}.back", [codes, *inputs], ir.DataType.FLOAT, data.shape)
        )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_scale_for_all_tokens_is_rescued(seed: int) -> None:
    """With a first token 30 times larger, eight bits for keys and values cost over ten times less after the split."""
    text = prompts(4, seed=seed)
    feeds, errors = unet_feeds(text), {}
    reference = run(normal_form(tiny_unet(seed)), feeds)["out_sample"].astype(np.float64)
    for split in (False, True):
        model = normal_form(tiny_unet(seed))
        if split:
            split_bos(model, find_units(model), TEXT, find_constant_rows([text]))
        round_inputs(model, [unit for unit in find_units(model) if unit.role == "cross_kv"], feeds)
        errors[split] = float(np.linalg.norm(run(model, feeds)["out_sample"] - reference))
    assert errors[False] > 10 * errors[True]


def texts_of(batch: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Queries and two texts, each with a first row of its own."""
    query = np.random.default_rng(0).standard_normal((batch, 4, CHANNELS)).astype(dtype)
    two = {"text": prompts(batch, width=16), "text_2": prompts(batch, width=24, larger=50)}
    return {"query": query, **{name: each.astype(dtype) for name, each in two.items()}}


@pytest.mark.parametrize("zeroed", [(), ("text",), ("text", "text_2")], ids=["whole", "one-empty", "both-empty"])
@pytest.mark.parametrize("chain", [(), [("Identity", {})]], ids=["direct", "behind"])
def test_two_texts_side_by_side(chain: Any, zeroed: tuple[str, ...]) -> None:
    """Each text has its constant, share and guard, also where the first entry of either is zeros; exact to 1e-5."""
    model, feeds = two_texts(chain=chain), texts_of(3)
    rows = {name: find_constant_rows([feeds[name]]) for name in ("text", "text_2")}
    for name in zeroed:
        feeds[name][0] = 0
    before = run(model, feeds)["out"]
    done = split_rows(model, find_units(model), rows)
    after = run(model, feeds)
    assert [(each.node, each.input) for each in done] == [(f"node.{x}", "text + text_2") for x in ("key", "value")]
    assert relative(after["out"], before) < 1e-5
    assert max(after["guard.text"], after["guard.text_2"]) < 1e-6
    feeds["text_2"][:, 0] += 1
    after = run(model, feeds)
    assert after["guard.text"] < 1e-6 < 1e-3 < after["guard.text_2"]


def test_two_texts_in_half_precision() -> None:
    """Shares and guards are of float32, the keys and values of what they were."""
    model, feeds = two_texts(dtype=np.float16), texts_of(2, np.float16)
    before = run(model, feeds)["out"]
    rows = {name: find_constant_rows([feeds[name]]) for name in ("text", "text_2")}
    assert len(split_rows(model, find_units(model), rows)) == 2
    after = run(model, feeds)
    assert relative(after["out"], before) < 4e-3
    assert max(after["guard.text"], after["guard.text_2"]) < 1e-6


def test_two_texts_are_split_together_or_not_at_all() -> None:
    """With the constant of one alone, or of another number of rows, the product stays as it is."""
    feeds = texts_of(3)
    one, other = (find_constant_rows([feeds[name]]) for name in ("text", "text_2"))
    longer = ConstantRows((0, 1), np.repeat(other.values, 2, axis=0))
    model = two_texts()
    before = ir.to_proto(model).SerializeToString()
    for rows in ({"text": one}, {"text_2": other}, {"text": one, "text_2": longer}):
        assert split_rows(model, find_units(model), rows) == ()
    assert ir.to_proto(model).SerializeToString() == before
