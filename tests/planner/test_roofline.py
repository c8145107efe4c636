"""The roofline: what it must be whatever the figures, and that they have the right size."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.planner.hardware import CLASSES, Hardware, hardware, known_hardware
from tandem.planner.model_spec import ModelSpec
from tandem.planner.performance import Adjusted, Chunk, context_switch_s, max_concurrency, peak
from tandem.planner.roofline import Efficiency, Roofline
from tests.planner import known_models as known

H100 = hardware("nvidia-h100")
IDEAL = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
SPECS = [
    ModelSpec.from_config(config)
    for config in (known.LLAMA_8B, known.QWEN3_235B, known.DEEPSEEK_V3, known.GPT_OSS_120B, known.OPT_13B)
]
LLAMA = SPECS[0]


def test_a_long_prompt_takes_its_arithmetic_and_a_lone_token_the_reading_of_the_weights() -> None:
    """Against the formulas of the textbook: 2 FLOP for each parameter and token, 4 for each head's value and pair."""
    ideal = Roofline(LLAMA, H100, efficiency=IDEAL)
    tokens, head = 8192, 4096 * 128256
    flops = 2 * tokens * (LLAMA.active_parameters - head) + 32 * 4 * 32 * 128 * tokens**2 / 2
    assert ideal.prefill_s(tokens) == pytest.approx(flops / H100.flops, rel=0.02)
    moved = 2 * LLAMA.active_parameters + 1000 * LLAMA.kv_bytes_per_token
    assert ideal.decode_step_s(1, 1000) == pytest.approx(moved / H100.bytes_per_s, rel=0.01)


def test_published_times_are_near() -> None:
    """An 8B model on an H100: some 21 ms for 1,000 tokens, 86 ms for 4,000; 12 ms for 32 requests of 4,000 tokens."""
    replica = Roofline(LLAMA, H100)
    assert replica.prefill_s(1024) == pytest.approx(0.021, rel=0.9)
    assert replica.prefill_s(4096) == pytest.approx(0.086, rel=0.7)
    assert replica.decode_step_s(32, 32 * 4096) == pytest.approx(0.0122, rel=0.5)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SPECS),
    st.sampled_from(sorted(CLASSES)),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 30_000),
    st.integers(0, 100_000),
    st.integers(1, 500),
)
def test_more_work_never_takes_less_time(
    spec: ModelSpec, name: str, devices: int, tokens: int, context: int, batch: int
) -> None:
    replica = Roofline(spec, hardware(name), devices)
    base = replica.step_s([Chunk(tokens, context)], batch, batch * 100.0)
    assert 0.0 < base < math.inf
    assert replica.step_s([Chunk(tokens + 1, context)], batch, batch * 100.0) >= base
    assert replica.step_s([Chunk(tokens, context + 1)], batch, batch * 100.0) >= base
    assert replica.step_s([Chunk(tokens, context)], batch + 1, batch * 100.0) >= base
    assert replica.step_s([Chunk(tokens, context)], batch, batch * 100.0 + 1) >= base
    assert replica.decode_step_s(batch, batch * 100.0) <= base
    whole = replica.prefill_s(2 * tokens, context)
    halves = replica.step_s([Chunk(tokens, context, last=False)], 0, 0) + replica.prefill_s(tokens, context + tokens)
    assert whole <= halves * (1 + 1e-9), "chunks read the weights once more each"


def test_nothing_takes_no_time_and_unknown_links_take_for_ever() -> None:
    replica = Roofline(LLAMA, H100)
    assert replica.prefill_s(0, 100) == replica.decode_step_s(0, 0) == replica.step_s((), 0, 0) == 0.0
    assert replica.transfer_s("host", 0) == 0.0
    assert replica.transfer_s("attic", 1) == math.inf
    assert replica.transfer_s("host", 2000) > replica.transfer_s("host", 1000) > 0.0


def test_experts_are_read_as_far_as_a_batch_touches_them() -> None:
    """One token reads 8 of 128 experts, a large batch nearly all of them; tokens pay for 8 in arithmetic."""
    spec = ModelSpec.from_config(known.QWEN3_235B)
    ideal = Roofline(spec, replace(H100, node_bytes_per_s=1e18), 8, IDEAL)
    lone, many = ideal.decode_step_s(1, 0), ideal.decode_step_s(200, 0)
    bytes_per_s = 8 * H100.bytes_per_s
    expected = (spec.active_parameters + spec.vocab * spec.hidden) / bytes_per_s
    assert lone == pytest.approx(expected, rel=0.05)
    assert many == pytest.approx(spec.parameters / bytes_per_s, rel=0.1)


def test_windows_bound_what_decoding_reads() -> None:
    wide = ModelSpec.from_config(known.LLAMA_8B)
    narrow = ModelSpec.from_config(known.LLAMA_8B | {"sliding_window": 1000})
    long, short = (Roofline(spec, H100, efficiency=IDEAL).decode_step_s(4, 40_000) for spec in (wide, narrow))
    assert long - short == pytest.approx(36_000 * wide.kv_bytes_per_token / H100.bytes_per_s, rel=0.01)
    assert Roofline(narrow, H100).prefill_s(30_000) < Roofline(wide, H100).prefill_s(30_000)
    one, two = (Roofline(narrow, H100, efficiency=IDEAL).prefill_s(n, 5000) for n in (10_000, 20_000))
    assert two == pytest.approx(2 * one, rel=0.01), "beyond the window every token costs the same"


def test_tensor_parallelism_helps_less_than_it_multiplies_and_a_slow_link_takes_it_back() -> None:
    times = [Roofline(LLAMA, H100, devices).prefill_s(4096) for devices in (1, 2, 4, 8)]
    assert all(half < one < 2 * half for one, half in itertools.pairwise(times))
    pcie = hardware("nvidia-l4")
    assert Roofline(LLAMA, pcie, 8).prefill_s(4096) > Roofline(LLAMA, pcie, 1).prefill_s(4096) / 8 * 1.5


def test_the_four_numbers() -> None:
    """Llama 8B in 80 GiB: some 56 GB are left for KV of 128 KiB a token."""
    replica = Roofline(LLAMA, H100)
    numbers = peak(replica, 4096)
    assert numbers.concurrency == max_concurrency(replica, 4096) == pytest.approx(110, rel=0.1)
    assert numbers.prefill_s == replica.prefill_s(4096)
    assert numbers.decode_s == replica.decode_step_s(numbers.concurrency, numbers.concurrency * 4096.0)
    assert numbers.switch_s == context_switch_s(replica, 4096) > 4096 * 131_072 / H100.host_bytes_per_s
    full = Roofline(ModelSpec.from_config(known.LLAMA_70B), H100)
    assert full.kv_tokens == 0.0
    assert peak(full, 4096).concurrency == 0
    assert peak(full, 4096).decode_s == math.inf


def test_heads_that_cannot_be_split_further_are_kept_more_than_once() -> None:
    spec = ModelSpec.from_config(known.LLAMA_8B | {"num_key_value_heads": 2})
    two, four = Roofline(spec, H100, 2), Roofline(spec, H100, 4)
    assert four.kv_tokens < 1.1 * two.kv_tokens


def test_an_adjusted_replica_is_slower_where_it_was_found_slower() -> None:
    base = Roofline(LLAMA, H100)
    slow = Adjusted(base, prefill=2.0, decode=1.5)
    assert slow.prefill_s(1000) == 2.0 * base.prefill_s(1000)
    assert slow.decode_step_s(8, 8000) == 1.5 * base.decode_step_s(8, 8000)
    assert slow.step_s((), 8, 8000) == slow.decode_step_s(8, 8000)
    mixed = slow.step_s([Chunk(1000)], 8, 8000)
    assert 1.5 * base.step_s([Chunk(1000)], 8, 8000) < mixed < 2.0 * base.step_s([Chunk(1000)], 8, 8000)
    assert Adjusted(base, math.nan, -1.0).prefill_s(9) == base.prefill_s(9)
    assert (slow.kv_tokens, slow.startup_s) == (base.kv_tokens, base.startup_s)


def test_classes_of_ones_own_go_first_and_unknown_ones_are_named() -> None:
    mine = Hardware(1e12, 1e11)
    own = {"nvidia-h100": mine, "abacus": mine}
    assert known_hardware("NVIDIA H100 80GB HBM3", own) is known_hardware("abacus", own) is mine
    assert known_hardware("nvidia-l4", own) == CLASSES["nvidia-l4"]
    with pytest.raises(ConfigError, match="'nvidia-h10' is not known; did you mean nvidia-h100"):
        known_hardware("nvidia-h10")


def test_what_is_impossible_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="hardware: flops: nan must be finite and more than 0"):
        Hardware(math.nan, 1e12)
    with pytest.raises(ConfigError, match="hardware: watts: -1"):
        Hardware(1e12, 1e12, watts=-1.0)
    with pytest.raises(ConfigError, match=r"efficiency: memory: 1\.2"):
        Efficiency(memory=1.2)
    with pytest.raises(ConfigError, match="devices: 3 must divide the 32 attention heads"):
        Roofline(LLAMA, H100, 3)


@pytest.mark.parametrize("weights", ["bfloat16", "fp8", "fp4", "int4"])
def test_narrow_weights_are_computed_with_as_the_device_can(weights: str) -> None:
    rates = {name: CLASSES[name].flops_for(weights) / CLASSES[name].flops for name in ("nvidia-h100", "nvidia-b200")}
    expected = {"bfloat16": (1, 1), "fp8": (2, 2), "fp4": (1, 4), "int4": (1, 1)}[weights]
    assert (rates["nvidia-h100"], rates["nvidia-b200"]) == expected
