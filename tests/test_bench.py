"""The benchmark harness: statistics, order of turns, the gate that keeps wrong providers untimed, and its files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from bench import _base, _case, _gate, _harness, _panel, _providers, _report, _schema, _stats, _timing, run  # noqa: E402
from pydl import _grading  # noqa: E402

TOY = """
import torch.nn.functional as F

def right(x, kernel_size, stride=None, padding=0):
    return F.max_pool2d(x, kernel_size, stride, padding)

def wrong(x, kernel_size, stride=None, padding=0):
    return F.avg_pool2d(x, kernel_size, stride, padding)

def wrong_gradient(x, kernel_size, stride=None, padding=0):
    y = F.max_pool2d(x.detach(), kernel_size, stride, padding)
    return y + 0 * x.sum()

def fails(x, kernel_size, stride=None, padding=0):
    raise RuntimeError("no such window")
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A user's module of max pools, importable as pool_toy."""
    (tmp_path / "pool_toy.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "pool_toy"
    sys.modules.pop("pool_toy", None)


def group(op="max_pool", case="host-8", mode="fwd", dtype="fp32"):
    return _harness.Group(op, next(c for c in _case.load(op).CASES if c.name == case), "cpu", dtype, mode)


# ---- statistics


def test_quantiles_interpolate_and_need_samples():
    assert _stats.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert _stats.quantile([1.0, 2.0, 3.0], 0.1) == pytest.approx(1.2)
    assert _stats.quantile([7.0], 0.9) == 7.0
    with pytest.raises(ValueError, match="no samples"):
        _stats.quantile([], 0.5)


def test_pair_ratio_is_immune_to_a_drift_that_both_sides_see():
    drift = [1.0, 5.0, 2.0, 40.0, 3.0]
    assert _stats.pair_ratio([2 * d for d in drift], drift) == 2.0
    with pytest.raises(ValueError, match="5 samples against 1"):
        _stats.pair_ratio(drift, [1.0])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_provider_takes_every_turn_equally_often(count):
    places = [[0] * count for _ in range(count)]
    for number in range(4 * count):
        order = _stats.turn_order(count, number)
        assert sorted(order) == list(range(count))
        for place, who in enumerate(order):
            places[who][place] += 1
    assert all(times == 4 for row in places for times in row)


@pytest.mark.parametrize(
    ("done", "elapsed", "goes_on"),
    [(0, 99.0, True), (3, 99.0, False), (3, 1.5, True), (7, 1.5, False), (7, 0.5, True), (400, 0.5, False)],
)
def test_rounds_fit_the_time_within_bounds(done, elapsed, goes_on):
    assert _stats.another_round(done, elapsed, seconds=1.0) is goes_on


class Recorder:
    """A subject that writes down when it is sampled."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def sample(self):
        self.log.append(self.name)
        return [1.0]


def test_providers_take_turns_round_by_round(monkeypatch):
    log = []
    monkeypatch.setattr(_stats, "another_round", lambda done, elapsed, seconds: done < 7)
    series = _harness.interleave([Recorder(n, log) for n in "abc"], seconds=1.0, warm_rounds=0)
    assert [len(s.rounds) for s in series] == [7, 7, 7]
    rounds = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac", "abc"]


def test_a_sample_in_which_other_work_held_a_core_is_taken_again(monkeypatch):
    waits = iter([0, 10**12, 10**12, 10**12])  # the first sample stood in line, the second did not
    monkeypatch.setattr(_timing, "waited_ns", lambda: next(waits))
    calls = []
    ms, disturbed = _timing.undisturbed_sample(lambda: calls.append(1), 3)
    assert len(calls) == 6 and not disturbed and ms > 0
    standing = iter(range(0, 10**15, 10**12))
    monkeypatch.setattr(_timing, "waited_ns", lambda: next(standing))
    assert _timing.undisturbed_sample(lambda: None, 1)[1]


class FakeEvent:
    """A CUDA event of a device that ends a spin after `patience` queries."""

    queries = 0
    patience = 0

    def __init__(self, enable_timing=False):
        pass

    def record(self):
        pass

    def elapsed_time(self, end):
        return 2.0

    def query(self):
        FakeEvent.queries += 1
        return FakeEvent.queries <= FakeEvent.patience


@pytest.mark.parametrize(("patience", "batches", "starved"), [(0, 1, 0), (2, 3, 0), (99, 4, 1)])
def test_a_gpu_batch_behind_which_the_stream_ran_dry_is_taken_again(monkeypatch, patience, batches, starved):
    spins = []
    monkeypatch.setattr(FakeEvent, "queries", 0)
    monkeypatch.setattr(FakeEvent, "patience", patience)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    clock = _timing.GpuClock(torch.device("cpu"))
    spins.clear()
    calls = []
    assert clock.batch(lambda: calls.append(1), 5, host_ms=0.01) == [2.0] * 5
    assert len(calls) == 5 * batches == 5 * len(spins)
    assert spins == sorted(spins) and clock.starved == starved


class FakeClock:
    """A GPU clock that runs the call and reports fixed numbers."""

    def batch(self, call, count, host_ms):
        return [float(call() is None) + 1.0 for _ in range(count)]

    def host_us(self, call):
        return 7.5


def test_rows_of_a_gpu_carry_host_cost_launches_and_syncs(monkeypatch):
    monkeypatch.setattr(_timing, "count_launches", lambda call: 2)
    monkeypatch.setattr(_timing, "count_syncs", lambda call: 0)
    case = _case.Case("tiny", _case.load("max_pool")._shape(2, 3, 8, 8))
    chosen = _harness.Group("max_pool", case, "cpu", "bf16", "bwd")
    (row,) = _harness.measure(chosen, ["torch"], {}, 0.0, clock=FakeClock())
    assert (row["host_us"], row["launches"], row["syncs"], row["disturbed"]) == (7.5, 2, 0, 0)
    assert row["samples"] == 3 * _harness.GPU_BATCH and row["median_ms"] == 1.0


def test_a_case_too_large_for_the_device_costs_no_other_case(monkeypatch):
    def no_room(group):
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(_harness, "make_inputs", no_room)
    rows = _harness.measure(group(), ["pydl", "torch"], {})
    assert [r["missing"] for r in rows] == [True, True] and "too much" in rows[0]["note"]
    assert _schema.problems(document(rows)) == []


# ---- the gate


def test_error_is_relative_to_rms_and_sees_odd_values():
    oracle = torch.tensor([3.0, 4.0, math.nan, math.inf], dtype=torch.float64)
    rms = math.sqrt(12.5)
    assert _gate.error(oracle + torch.tensor([0.0, 0.5, 0.0, 0.0]), oracle) == pytest.approx(0.5 / rms)
    assert _gate.error(torch.tensor([3.0, 4.0, math.nan, -math.inf]), oracle) == math.inf
    assert _gate.error(torch.tensor([3.0, 4.0, 1.0, math.inf]), oracle) == math.inf
    assert _gate.error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert _gate.error(torch.tensor([1e-30]), torch.zeros(1)) == math.inf
    assert _gate.error(torch.zeros(2), torch.zeros(3)) == math.inf


def test_bound_follows_the_rule():
    oracle = torch.ones(10)
    eps = torch.finfo(torch.bfloat16).eps
    assert _gate.bound(0.1, oracle, torch.bfloat16, gradient=False) == pytest.approx(0.2 + 4 * eps)
    assert _gate.bound(0.1, oracle, torch.bfloat16, gradient=True) == pytest.approx(0.3 + 4 * eps)
    assert _gate.bound(0.0, oracle, torch.bfloat16, gradient=True, reduced=100) == pytest.approx(40 * eps)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_gate_and_verify_share_one_rule(gradient):
    torch.manual_seed(0)
    oracle = torch.randn(1000, dtype=torch.float64) * 7
    oracle[3], oracle[5] = math.nan, -math.inf
    theirs, ours = (oracle.bfloat16() * (1 + 0.01 * torch.rand(1000)).bfloat16() for _ in range(2))
    grade = _grading.grade(ours, oracle, theirs, gradient=gradient, reduction=9)
    assert _gate.error(ours, oracle) == pytest.approx(grade.err)
    bound = _gate.bound(_gate.error(theirs, oracle), oracle, torch.bfloat16, gradient, 9)
    assert bound == pytest.approx(grade.bound)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["layer_norm", "max_pool", "activations"])
def test_numpy_oracle_lets_torch_pass(op, dtype):
    case = next(c for c in _case.load(op).CASES if c.host)
    chosen = _harness.Group(op, case, "cpu", dtype, "full")
    fn = _providers.torch_function(op, case)
    gate = _gate.Gate(_providers.function_name(op, case), fn, _harness.make_inputs(chosen), gradients=True)
    assert gate.source == "numpy float64"
    assert gate.check(fn).ok


def test_an_unwritten_element_is_seen():
    call, before = _harness.make_inputs(group()), torch.are_deterministic_algorithms_enabled()

    def lazy(x, kernel_size, stride=None, padding=0):
        out = torch.empty_like(torch.nn.functional.max_pool2d(x, kernel_size, stride, padding))
        out.view(-1)[:-1] = torch.nn.functional.max_pool2d(x, kernel_size, stride, padding).view(-1)[:-1]
        return out

    gate = _gate.Gate("max_pool2d", torch.nn.functional.max_pool2d, call, gradients=False)
    assert not gate.check(lazy).ok
    assert torch.are_deterministic_algorithms_enabled() == before


# ---- rows


@pytest.mark.parametrize("mode", ["fwd", "bwd", "full"])
def test_a_wrong_provider_is_reported_and_not_timed(toy, mode):
    case = _case.Case("tiny", _case.load("max_pool")._shape(2, 3, 8, 8))
    chosen = _harness.Group("max_pool", case, "cpu", "fp32", mode)
    names = ["torch", *(f"{toy}:{n}" for n in ("right", "wrong", "wrong_gradient", "fails"))]
    rows = {r["provider"].partition(":")[2] or "torch": r for r in _harness.measure(chosen, names, {}, seconds=0.01)}
    assert rows["torch"]["ok"] and rows["torch"]["ratio_to_torch"] == 1.0
    assert rows["right"]["ok"] and rows["right"]["median_ms"] > 0 and rows["right"]["ratio_to_torch"] > 0
    for name in ("wrong", "fails") if mode == "fwd" else ("wrong", "wrong_gradient", "fails"):
        assert not rows[name]["ok"] and rows[name]["median_ms"] is None, name
        assert rows[name]["note"], name
    assert "no such window" in rows["fails"]["note"]
    assert rows["wrong_gradient"]["ok"] == (mode == "fwd")
    assert _schema.problems(document(list(rows.values()))) == []


def test_a_missing_provider_is_no_wrong_one():
    rows = _harness.measure(group(), ["torch", "no_such_module:fn", "nobody"], {}, seconds=0.001)
    assert [bool(r.get("missing")) for r in rows] == [False, True, True]
    assert "No module named" in rows[1]["note"] and "unknown provider" in rows[2]["note"]
    assert "wrong results: 0" in _report.summary(rows)


def test_pydl_rows_name_the_backend_and_their_targets():
    rows = _harness.measure(group("activations"), ["pydl", "torch"], {}, seconds=0.001)
    assert rows[0]["backend"] == "torch"  # plain activations on a CPU are torch's own
    assert rows[0]["target"] == {"host_us": 8.0} and rows[0]["met"] in (True, False, None)
    assert rows[0]["host_us"] == pytest.approx(rows[0]["median_ms"] * 1e3)
    assert rows[1]["target"] == {} and rows[1]["met"] is None


@pytest.mark.parametrize(
    ("measured", "target", "met"),
    [
        ({"ratio_to_torch": 8.1}, {"ratio_to_torch": 8.0}, True),
        ({"ratio_to_torch": 7.9}, {"ratio_to_torch": 8.0}, False),
        ({"host_us": 8.1}, {"host_us": 8.0}, False),
        ({"ratio_to_torch": 2.0, "ratios": {"compile": 0.9}}, {"ratio_to_torch": 1.8, "ratio_to_compile": 1.0}, False),
        ({"ratio_to_torch": 2.0}, {"ratio_to_torch": 1.8, "ratio_to_compile": 1.0}, True),
        ({}, {"roof_share": 0.85}, None),
    ],
)
def test_targets(measured, target, met):
    row = {"ratio_to_torch": None, "host_us": None, "roof_share": None, "ratios": {}, "target": target, **measured}
    assert _harness.target_met(row) is met


@pytest.mark.parametrize(("ours", "theirs", "met"), [(0, 4, True), (0, 6, None), (6, 0, None)])
def test_a_ratio_with_a_disturbed_side_decides_nothing(ours, theirs, met):
    row = {"provider": "pydl", "samples": 10, "disturbed": ours, "target": {"ratio_to_torch": 8.0}, "met": True}
    other = {"provider": "torch", "samples": 10, "disturbed": theirs, "target": {}, "met": None}
    _harness._leave_open([row, other])
    assert row["met"] is met and other["met"] is None


def test_share_of_the_nearer_roof():
    roof = {"copy_gbs": 10.0, "gemm_gflops": 100.0}
    assert _harness.share_of_roof(10_000_000, 1, 2.0, roof) == pytest.approx(0.5)
    assert _harness.share_of_roof(1, 100_000_000, 4.0, roof) == pytest.approx(0.25)
    assert _harness.share_of_roof(1, 1, 1.0, {}) is None


# ---- bench files


def test_bench_files_are_found_by_name(tmp_path):
    (tmp_path / "bench_conv.py").touch()
    (tmp_path / "_harness.py").touch()
    assert _case.discover(tmp_path) == ["conv"]
    assert {"activations", "layer_norm", "max_pool"} <= set(_case.discover())
    with pytest.raises(ValueError, match="no bench file for 'nothing'"):
        _case.load("nothing")


@pytest.mark.parametrize("op", _case.discover())
def test_bench_files_are_complete(op):
    module = _case.load(op)
    assert module.__doc__ and module.CASES
    names = [c.name for c in module.CASES]
    assert len(names) == len(set(names))
    for device in ("cpu", "cuda"):
        cases = _case.select(op, device)
        assert {c.grad for c in cases if c.host} >= {False}, "host cost"
        if any("full" in c.modes for c in cases):
            assert any(c.grad for c in cases if c.host), "host cost with a gradient"
        assert any(c.panel for c in cases), "a case for the panel"
        assert any(c.targets for c in cases)
    for case in module.CASES:
        assert callable(_providers.torch_function(op, case))
        for key, target in case.targets.items():
            device, mode = key.split()
            assert device in case.devices and mode in case.modes, f"{case.name}: {key} never runs"
            assert set(target) <= set(_case.TARGET_METRICS)
        for mode in case.modes:
            assert min(_case.work(op, case, "bf16", mode)) > 0


def test_inputs_are_the_same_for_the_same_seed_and_keep_the_layout():
    case = next(c for c in _case.load("max_pool").CASES if c.name == "small-1x64x56x56-cl")
    first, second = (_case.make_call("max_pool", case, "bf16", "cpu") for _ in range(2))
    assert torch.equal(first.args[0], second.args[0])
    assert first.args[0].is_contiguous(memory_format=torch.channels_last)
    assert first.map(torch.Tensor.double).args[0].is_contiguous(memory_format=torch.channels_last)


# ---- files and the command line


def document(rows):
    environment = dict.fromkeys(_schema.ENVIRONMENT)
    return json.loads(json.dumps({"schema": 1, "environment": environment, "rows": rows}))


def test_the_schema_refuses_what_would_mislead():
    rows = _harness.measure(group(), ["torch"], {}, seconds=0.001)
    assert _schema.problems(document(rows)) == []
    for change, message in (
        ({"ok": False}, "wrong provider was timed"),
        ({"p10_ms": 1e9}, "p10 <= median <= p90"),
        ({"mode": "sideways"}, "mode is 'sideways'"),
        ({"speed": 3}, "unknown key speed"),
        ({"launches": 1.5}, "launches is 1.5"),
        ({"ok": 1}, "ok is 1"),
    ):
        assert any(message in p for p in _schema.problems(document([{**rows[0], **change}]))), message
    short = {k: v for k, v in rows[0].items() if k != "backend"}
    assert any("lacks backend" in p for p in _schema.problems(document([short])))
    assert _schema.problems({"schema": 2, "rows": []}) == ["schema is 2, expected 1", "environment is missing"]
    assert _schema.problems([]) == ["the document is not an object"]


def test_committed_results_are_valid():
    for path in (ROOT / "bench/results").glob("*.json"):
        parsed = json.loads(path.read_text())
        if "rows" in parsed:
            assert _schema.problems(parsed) == [], path.name


def test_a_real_run_writes_a_valid_file_and_shows_every_provider(toy, tmp_path, capsys):
    target = tmp_path / "out.json"
    arguments = "max_pool --device cpu --case small-1x64x56x56-cl --mode fwd --seconds 0.02".split()
    code = run.main([*arguments, "--provider", f"pydl,torch,{toy}:right,{toy}:wrong", "--json", str(target)])
    printed = capsys.readouterr().out
    parsed = json.loads(target.read_text())
    assert code == 1  # a provider was wrong
    assert _schema.problems(parsed) == []
    assert [r["provider"] for r in parsed["rows"]] == ["pydl", "torch", f"{toy}:right", f"{toy}:wrong"]
    assert [r["ok"] for r in parsed["rows"]] == [True, True, True, False]
    assert parsed["rows"][0]["roof_share"] > 0 and parsed["environment"]["roofline"]["fp32"]["copy_gbs"] > 0
    assert "WRONG, not timed" in printed and f"{parsed['environment']['threads']} threads" in printed
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "no bench file for no_such_op"),
        (["--dtype", "fp7"], "unknown dtype or mode: fp7"),
        (["max_pool", "--case", "nothing"], "no case matches"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        run.main([*arguments, "--device", "cpu"])


def test_the_panel_measures_every_op(capsys, monkeypatch):
    tiny = {op: [c for c in _case.load(op).CASES if c.host] for op in _case.discover()}
    modes = {op: ("fwd", "bwd")[: max(len(c.modes) for c in _case.load(op).CASES)] for op in tiny}
    for op, cases in tiny.items():
        marked = [_case.Case(f"tiny-{op}", cases[0].params, modes=modes[op], panel=True, function=cases[0].function)]
        monkeypatch.setattr(_case.load(op), "CASES", marked)
    monkeypatch.setattr(_stats, "another_round", lambda done, elapsed, seconds: done < 3)
    rows, rounds = _panel.where_pydl_pays(seconds=30.0, device="cpu"), sum(map(len, modes.values()))
    printed = capsys.readouterr().out
    assert {r["op"] for r in rows} == set(tiny) and all(r["ok"] for r in rows), [r["note"] for r in rows]
    assert printed.count("tiny-") == rounds and "torch / pydl" in printed
    assert len(_panel.where_pydl_pays(seconds=0.0, device="cpu")) == 1
    assert f"{rounds - 1} of {rounds} rows were left out" in capsys.readouterr().out


def test_a_roofline_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import _plot

    row = {"op": "a", "device": "cpu", "dtype": "fp32", "provider": "torch", "bytes": 8, "flops": 2}
    environment = {"roofline": {"fp32": {"copy_gbs": 10.0, "gemm_gflops": 90.0}}, "device": "a chip", "torch": "2"}
    paths = _plot.roofline([{**row, "median_ms": 1.0, "roof_share": 0.1}], environment, tmp_path)
    assert [p.name for p in paths] == ["roofline-cpu-fp32.svg", "roofline-cpu-fp32.png"]
    assert all(p.stat().st_size > 1000 for p in paths)


def test_another_checkout_is_measured_in_its_own_process():
    with_worker = _base.Base.__new__(_base.Base)
    with_worker.ref, with_worker.threads, with_worker.tree = "here", torch.get_num_threads(), ROOT
    with_worker._worker = None
    rows = _harness.measure(group("activations"), ["pydl", "torch"], {}, 0.01, [with_worker.subject])
    try:
        assert [r["provider"] for r in rows] == ["pydl", "torch", "base:here"]
        assert rows[2]["ok"], rows[2]["note"]
        assert rows[0]["ratios"].keys() == {"torch", "base:here"}
    finally:
        with_worker._worker.kill()
        with_worker._worker.communicate()
