"""The benchmarks' machinery on tiny shapes: no time is asserted, only what is computed and kept."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import (
    arms,
    bandwidth,
    capturing,
    decoding,
    folding,
    gates,
    main_job,
    memory,
    protocol,
    ratios,
    run,
    tables,
    to_the_same_rate,
    updating,
)
from experiments.benchmarks.protocol import Ratio, compared, interleaved, ratio_of
from experiments.benchmarks.shapes import TINY
from nest.tuning.update import ClusterUpdate

CPU = torch.device("cpu")
SMALL = replace(TINY, dtype=torch.float32)
RESULTS = sorted(tables.RESULTS.glob("*.json"))
# PEFT's SHiRA makes sparse tensors, and torch asks its caller to choose whether they are checked.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
needs_nnsight = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed")


def line(id_: str = "R1", gate: str = "pass", **changes: Any) -> dict[str, Any]:
    """A ratio as the result files have it."""
    fields = {"name": "ours / theirs", "ratio": 0.5, "ci95": (0.4, 0.6), "target": "<= 0.80"}
    made = Ratio(**{"id": id_, "gate": gate, "samples": 30, **fields, **changes})
    return made.to_json()


def content(*lines: dict[str, Any]) -> dict[str, Any]:
    return {
        "machine": {"processor": "a processor", "cores": 2},
        "versions": {"python": "3.11", "torch": "2.13"},
        "commit": "abc1234",
        "ratios": list(lines),
    }


class TestRatios:
    def test_the_ratio_is_of_medians_and_lies_in_its_interval(self) -> None:
        draw = torch.Generator().manual_seed(0)
        theirs = (1 + 0.1 * torch.rand(31, generator=draw)).tolist()
        ours = (0.5 + 0.1 * torch.rand(31, generator=draw)).tolist()
        ratio, (low, high) = ratio_of(ours, theirs)
        assert ratio == sorted(ours)[15] / sorted(theirs)[15]
        assert low < ratio < high
        assert ratio_of(ours, theirs) == (ratio, (low, high))

    def test_rounds_are_resampled_in_pairs(self) -> None:
        """A machine that slows down hits both alike: the ratio of every round is the same."""
        theirs = [float(i) for i in range(1, 40)]
        ours = [0.5 * seconds for seconds in theirs]
        ratio, (low, high) = ratio_of(ours, theirs)
        assert ratio == low == high == 0.5

    def test_linearity(self) -> None:
        rounds = [1.0, 1.1, 0.9]
        straight, (low, high) = ratios.linearity(
            [1, 2, 4], [[n * r for r in rounds] for n in (1, 2, 4)]
        )
        assert (straight, low, high) == pytest.approx((1.0, 1.0, 1.0))
        assert ratios.linearity([1, 2, 3], [[1.0], [9.0], [1.0]])[0] == pytest.approx(0.0)

    def test_every_arm_runs_in_every_round_in_rotating_order(self) -> None:
        called: list[str] = []
        made: dict[str, Callable[[], object]] = {n: lambda n=n: called.append(n) for n in "abc"}
        seconds = interleaved(made, CPU, repeats=2, warm_up=1, inner=2)
        assert "".join(called) == "aabbccbbccaaccaabb"
        assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 2)

    @pytest.mark.parametrize(
        ("ratio", "target", "gate", "verdict"),
        [
            (0.80, "<= 0.80", "pass", "met"),
            (0.81, "<= 0.80", "pass", "missed"),
            (3.1, ">= 3", "pass", "met"),
            (2.9, ">= 3", "pass", "missed"),
            (math.nan, "<= 0.80", "pass", "missed"),
            (0.10, "<= 0.80", "fail", "invalid"),
        ],
    )
    def test_verdict(self, ratio: float, target: str, gate: Any, verdict: str) -> None:
        made = Ratio("R1", "ours / theirs", ratio, (ratio, ratio), target, gate, 30)
        assert made.verdict == verdict == tables.verdict(made.to_json())
        assert verdict in run.line_of(made)

    def test_compared_takes_the_gate_and_the_medians(self) -> None:
        seconds = {"a": [1.0, 2.0, 9.0], "b": [4.0, 4.0, 4.0]}
        made = compared("R9", "a / b", seconds, "a", "b", target="<= 1", gate=False)
        assert (made.ratio, made.gate, made.samples) == (0.5, "fail", 3)
        assert made.figures == {"a ms": 2000.0, "b ms": 4000.0}

    def test_every_target_can_be_read(self) -> None:
        assert tables.holds(0.4, "< 0.5") and not tables.holds(0.5, "< 0.5")
        with pytest.raises(KeyError):
            tables.holds(0.4, "== 0.5")


class TestKeep:
    def test_other_lines_stay_and_lines_of_the_same_id_go(self, tmp_path: Path) -> None:
        path = tmp_path / "cpu.json"
        run.keep(path, CPU, "ratios", [line("R10"), line("R1"), line("R2")])
        run.keep(path, CPU, "ratios", [line("R2", "fail"), line("R2b")])
        run.keep(
            path, CPU, "main_job", [main_job._row("nest --help", 0.1, "s", "< 0.5") | {"id": "h"}]
        )
        found = json.loads(path.read_text())
        assert [entry["id"] for entry in found["ratios"]] == ["R1", "R2", "R2b", "R10"]
        assert [entry["gate"] for entry in found["ratios"]] == ["pass", "fail", "pass", "pass"]
        assert found["main_job"][0]["value"] == 0.1
        check_schema(found)

    def test_lines_of_another_machine_go(self, tmp_path: Path) -> None:
        path = tmp_path / "cpu.json"
        path.write_text(json.dumps(content(line("R1"))))
        run.keep(path, CPU, "ratios", [line("R2")])
        assert [entry["id"] for entry in run.read(path)["ratios"]] == ["R2"]

    def test_some_lines_cannot_be_put_beside_those_of_another_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = json.dumps(content(line("R1")))
        (tmp_path / "cpu.json").write_text(before)
        monkeypatch.setattr("sys.argv", ["run", "--only", "R1", "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            run.main()
        assert "another machine" in capsys.readouterr().err
        assert (tmp_path / "cpu.json").read_text() == before

    def test_an_unknown_ratio_is_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.argv", ["run", "--only", "R1,R99"])
        with pytest.raises(SystemExit):
            run.main()
        assert "no ratio R99 on cpu" in capsys.readouterr().err

    def test_only_what_is_asked_for_is_measured_and_printed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        made = Ratio("R8", "fold", 0.01, (0.01, 0.02), "<= 0.05", "fail", 30)
        monkeypatch.setattr(ratios, "CPU", {**ratios.CPU, "R8": lambda _device: [made]})
        monkeypatch.setattr("sys.argv", ["run", "--only", "R8", "--out", str(tmp_path)])
        run.main()
        assert "invalid" in capsys.readouterr().out
        assert [entry["id"] for entry in run.read(tmp_path / "cpu.json")["ratios"]] == ["R8"]


class TestArms:
    """Each trains what it says, and nothing else moves."""

    @pytest.mark.parametrize("name", arms.ARMS)
    def test_a_step_changes_what_is_trained(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = keep_model(monkeypatch)
        with arms.ARMS[name](SMALL, CPU) as arm:
            # `nest_update`, which holds the update, is no part of the model
            own = [m for n, m in model.made.named_modules() if not n.startswith("nest_update")]
            assert not any(module.training for module in own)
            before = {n: p.detach().clone() for n, p in model.made.named_parameters()}
            arm.step()
            after = dict(model.made.named_parameters())
            moved = {n: int((after[n] != before[n]).sum()) for n in before}
            assert sum(moved.values()) > 0
            assert {n for n, count in moved.items() if count} <= self.trainable(name, before)
            assert all(p.grad is None for p in after.values())
            if name in ("full", "shira"):
                assert arm.trained == sum(before[n].numel() for n in self.trainable(name, before))
            if name == "lora":
                assert arm.trained == 2 * 3 * 16 * (SMALL.d_model + SMALL.d_ff)
            if name == "masked":
                assert arm.trained == 2 * 2 * SMALL.n_neurons * SMALL.d_model
                assert sum(moved.values()) <= arm.trained
            if name == "nest":
                vectors, loadings = SMALL.n_clusters * SMALL.d_model, SMALL.n_neurons
                assert (
                    arm.trained
                    == before["nest_update.packed"].numel()
                    == 2 * 2 * (vectors + loadings)
                )

    @staticmethod
    def trainable(name: str, parameters: dict[str, torch.Tensor]) -> set[str]:
        gated = {n for n in parameters if n.endswith(("gate_proj.weight", "up_proj.weight"))}
        return {
            "nest": gated | {"nest_update.packed"},
            "lora": {n for n in parameters if "lora_" in n},
            "shira": {n for n in parameters if "shira_" in n},
            "full": set(parameters),
            "masked": gated,
        }[name]

    def test_all_begin_with_the_same_weights_batch_and_loss(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        losses: list[float] = []
        real = arms.batch_loss

        def noted(*arguments: Any) -> torch.Tensor:
            loss = real(*arguments)
            losses.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(arms, "batch_loss", noted)
        for make in arms.ARMS.values():
            with make(SMALL, CPU) as arm:
                arm.step()
        # PEFT's own weights are zero at the start, and so is our update: the forward pass is the base's
        assert losses == pytest.approx(losses[:1] * len(arms.ARMS), rel=1e-6)

    @pytest.mark.parametrize("name", arms.ARMS)
    def test_every_head_runs_at_the_targets_only(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, seen = keep_model(monkeypatch), []
        with arms.ARMS[name](SMALL, CPU) as arm:
            model.made.lm_head.register_forward_hook(
                lambda _module, _inputs, logits: seen.append(logits.numel())
            )
            arm.step()
        assert seen == [SMALL.n_rows * SMALL.n_targets * SMALL.vocabulary]

    def test_all_clip_their_gradients(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clipped: list[float] = []
        monkeypatch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda _parameters, norm: clipped.append(norm)
        )
        for make in arms.ARMS.values():
            with make(SMALL, CPU) as arm:
                arm.step()
        assert clipped == [arms.MAX_NORM] * len(arms.ARMS)

    def test_upper_layers_from_the_cache(self) -> None:
        with arms.nest_step(SMALL, CPU, first_layer=1) as arm:
            arm.step()
            arm.step()
            vectors, loadings = SMALL.n_clusters * SMALL.d_model, SMALL.n_neurons
            assert arm.trained == 2 * (vectors + loadings)

    def test_as_many_parameters_as_shira(self) -> None:
        for shape in (ratios.shape_for(CPU), ratios.shape_for(CPU, memory=True)):
            theirs = 3 * shape.n_layers * (shape.d_model + shape.d_ff)
            ours = 2 * shape.n_layers * ratios.like_shira(shape) * shape.d_model
            assert ours == pytest.approx(theirs, rel=0.1)


class TestGates:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """What an earlier test found is not remembered."""
        monkeypatch.setattr(gates, "N_STEPS", 5)
        gates.step_gate.cache_clear()
        yield
        gates.step_gate.cache_clear()

    def test_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gates, "N_STEPS", 50)
        assert gates.step_gate("cpu", torch.float32)
        assert ratios.prefix_gate(SMALL, CPU)
        in_bf16 = gates.rounding_error(replace(TINY, dtype=torch.bfloat16), CPU)
        assert gates.RELATIVE < in_bf16 <= gates.ROUNDING[torch.bfloat16]

    @pytest.mark.parametrize("spoil", ["a little", "nothing but NaN", "the loadings"])
    def test_fail_when_the_gradient_is_spoiled(
        self, spoil: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = torch.Tensor.backward

        def spoiled(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            real(loss, *args, **kwargs)
            for update in updates:
                if update.packed.grad is None:
                    continue
                if spoil == "a little":
                    update.packed.grad[0] += 1e-3 * update.packed.grad.abs().max()
                elif spoil == "nothing but NaN":
                    update.packed.grad.fill_(math.nan)
                elif update.form == "loaded":
                    update.packed.grad[-1] *= 1.01

        updates = keep_updates(monkeypatch)
        monkeypatch.setattr(torch.Tensor, "backward", spoiled)
        assert not gates.step_gate("cpu", torch.float32)

    def test_fail_when_the_step_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = gates.NeuronAdamW
        monkeypatch.setattr(gates, "NeuronAdamW", lambda u, lr: real(u, lr=lr * 1.001))
        assert gates.gradient_error(TINY, CPU) <= gates.RELATIVE
        assert not gates.step_gate("cpu", torch.float32)

    def test_fail_when_only_the_run_dtype_is_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a kernel would be that fp64 does not use."""
        monkeypatch.setitem(gates.ROUNDING, torch.float32, 1e-12)
        assert not gates.step_gate("cpu", torch.float32)

    def test_the_prefix_gate_fails_on_other_hidden_states(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = arms.FrozenPrefix._entering
        monkeypatch.setattr(
            arms.FrozenPrefix, "_entering", lambda self, batch: 1.1 * real(self, batch).flip(0)
        )
        assert not ratios.prefix_gate(SMALL, CPU)

    def test_nan_is_the_worst_error(self) -> None:
        assert gates.worst([0.0, 2.0, 1.0]) == 2.0
        assert math.isnan(gates.worst([0.0, math.nan, 1.0]))
        assert math.isnan(gates.worst([]))


class TestOptimizerArms:
    def test_all_step_and_the_gate_passes(self) -> None:
        with updating.optimizer_arms(SMALL, CPU) as (made, gate):
            assert gate
            assert set(made) == {"nest", "rows", "packed", "masked"}
            for step in made.values():
                step()

    def test_rows_that_are_not_written_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = updating.read_rows
        monkeypatch.setattr(updating, "read_rows", lambda *a: real(*a).nextafter(torch.tensor(9.0)))
        with updating.optimizer_arms(SMALL, CPU) as (_, gate):
            assert not gate

    def test_many_rows_through_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        size = {"n_elements": 200 * 64, "width": 64}
        with bandwidth.row_arms(CPU, **size) as (moved, gate):
            assert gate
            # bf16: W0 read, W written; fp32: 3 read and written and 1 read of 2 vectors and 200 loadings
            assert moved["nest"].n_bytes == 200 * 64 * 4 + 7 * 4 * (2 * 64 + 200)
            assert moved["copy"].n_bytes == 200 * 64 * 4
        monkeypatch.setattr(ratios, "interleaved", few)
        assert ratios.r5d(CPU, **size).gate == "pass"

    def test_many_rows_of_which_one_is_wrong_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = bandwidth.neuron_adamw

        def spoiled(table: Any, *args: Any, **kwargs: Any) -> None:
            real(table, *args, **kwargs)
            table[0].weight[5, 7] += 1

        monkeypatch.setattr(bandwidth, "neuron_adamw", spoiled)
        with bandwidth.row_arms(CPU, n_elements=200 * 64, width=64) as (_, gate):
            assert not gate

    @pytest.mark.gpu
    def test_gates_and_rows_on_a_gpu(self) -> None:
        gates.step_gate.cache_clear()
        assert gates.step_gate("cuda", torch.bfloat16)
        with bandwidth.row_arms(torch.device("cuda"), n_elements=200 * 64, width=64) as (_, gate):
            assert gate

    @pytest.mark.gpu
    def test_a_graph_of_the_step(self) -> None:
        device = torch.device("cuda")
        with bandwidth.graph_arms(replace(TINY, dtype=torch.bfloat16), device) as (made, gate):
            assert gate
            for step in made.values():
                step()


class TestFolding:
    def test_times_and_gate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(folding, "WARM_UP", 1)
        monkeypatch.setattr(folding, "REPEATS", 2)
        seconds, gate = folding.fold_times(SMALL, CPU)
        assert gate
        assert {name: len(values) for name, values in seconds.items()} == {"nest": 2, "lora": 2}

    def test_a_fold_that_does_nothing_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nest.patches.patch import NeuronPatch

        monkeypatch.setattr(folding, "WARM_UP", 0)
        monkeypatch.setattr(folding, "REPEATS", 1)
        for method in ("fold_into", "revert"):
            monkeypatch.setattr(NeuronPatch, method, lambda _self, _model: None)
        _, gate = folding.fold_times(SMALL, CPU)
        assert not gate


class TestCapturing:
    @pytest.fixture(autouse=True)
    def few_prompts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(capturing, "N_PROMPTS", 6)
        monkeypatch.setattr(capturing, "SHORTEST", 3)
        monkeypatch.setattr(capturing, "LONGEST", 9)
        monkeypatch.setattr(capturing, "BATCH_SIZE", 4)

    def test_both_run_and_the_gate_passes(self) -> None:
        for make in (capturing.bare, capturing.ours):
            with make(SMALL, CPU) as arm:
                arm.step()
        assert capturing.gate(SMALL, CPU)

    def test_other_activations_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = capturing.pooled_by_hooks

        def other(*args: Any) -> list[torch.Tensor]:
            found = real(*args)
            return [*found[:-1], found[-1] + 1e-3]

        monkeypatch.setattr(capturing, "pooled_by_hooks", other)
        assert not capturing.gate(SMALL, CPU)

    @needs_nnsight
    # nnsight's own: it compiles the body of each `with` block anew
    @pytest.mark.filterwarnings("ignore::DeprecationWarning:nnsight")
    def test_nnsight_finds_the_same(self) -> None:
        for pooled in (False, True):
            with capturing.nnsight(SMALL, CPU, pooled=pooled) as arm:
                arm.step()
        assert capturing.gate(SMALL, CPU, rival=True)


class TestDecoding:
    @pytest.fixture(autouse=True)
    def few_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        values = {"N_PROMPTS": 6, "SHORTEST": 3, "LONGEST": 9, "NEW_TOKENS": 5, "REPEATS": 2}
        for name, value in {**values, "BATCH_SIZES": (2, 4)}.items():
            monkeypatch.setattr(decoding, name, value)

    def test_times_and_gate(self) -> None:
        seconds, gate, note = decoding.decoding_times(SMALL, CPU)
        assert gate
        assert "100 % of the answers are equal" in note
        assert {name: len(values) for name, values in seconds.items()} == {"nest": 2, "generate": 2}

    def test_other_answers_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = decoding.generate_tokens
        monkeypatch.setattr(
            decoding, "generate_tokens", lambda *a: [[3, *row[1:]] for row in real(*a)]
        )
        _, gate, _ = decoding.decoding_times(SMALL, CPU)
        assert not gate

    def test_answers_may_part_at_a_tie_only(self) -> None:
        model, prompt = SMALL.model(CPU), [5, 6, 7]
        order = model(torch.tensor([prompt])).logits[0, -1].argsort(descending=True).tolist()
        for other, expected in ((order[0], True), (order[-1], False)):
            (found,) = decoding.agree(model, [prompt], [[order[0], 9]], [[other, 9]], CPU)
            assert found is expected


class TestMemory:
    def test_the_parent_does_not_count(self) -> None:
        """A process that holds much starts one that holds little."""
        ballast = bytearray(300 * 2**20)
        # what `peak` calls, without importing torch: that takes seconds and half as much memory
        body = inspect.getsource(memory._status)
        code = f"from pathlib import Path\n{body}\nprint(_status('VmHWM'))"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        assert 0 < int(done.stdout) < len(ballast)

    def test_prints_what_an_arm_took(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ran: list[Any] = []
        large = replace(SMALL, vocabulary=2**19)  # 67 MB, embedding and head each
        monkeypatch.setattr(
            memory, "shape_for", lambda _device, memory: ran.append(memory) or large
        )
        memory.main("nest", "cpu", json.dumps({"n_clusters": 2}))
        assert ran == [True]
        assert int(capsys.readouterr().out) > 0
        assert memory.peak(CPU) >= memory.resident() - 2**20

    def test_a_line_of_two_arms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, dict[str, object]]] = []

        def memory_of(arm: str, _device: torch.device, **settings: object) -> int:
            asked.append((arm, settings))
            return {"nest": 2**20, "shira": 2**22}[arm]

        monkeypatch.setattr(ratios, "memory_of", memory_of)
        made = ratios._memory("R3m", "SHiRA", "shira", "<= 0.70", CPU, True, n_clusters=5)
        assert asked == [("nest", {"n_clusters": 5}), ("shira", {})] * made.samples
        assert (made.ratio, made.figures) == (0.25, {"ours MiB": 1.0, "theirs MiB": 4.0})


class TestSameRate:
    """The search for schedules and LoRA's rate, with training and measuring made up."""

    @pytest.fixture(autouse=True)
    def no_world(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(to_the_same_rate, "World", FakeWorld)

    def test_each_takes_its_shortest_schedule(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, enough in (("_nest", 1.0), ("_lora", 0.25)):
            monkeypatch.setattr(
                to_the_same_rate, name, lambda _w, c, e=enough: (c.epochs, found(c.epochs >= e))
            )
        seconds, reached, figures = to_the_same_rate.times(CPU)
        assert reached
        assert seconds == {"nest": [1.0] * 3, "lora": [0.25] * 3}
        assert figures["nest seed 0 epochs"] == 1.0

    def test_a_side_that_does_not_get_there_fails_the_gate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(to_the_same_rate, "_nest", lambda _w, c: (1.0, found(True)))
        monkeypatch.setattr(to_the_same_rate, "_lora", lambda _w, c: (1.0, found(c.seed != 1)))
        _, reached, _ = to_the_same_rate.times(CPU)
        assert not reached

    def test_both_run_at_the_rate_that_gets_there_first(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert to_the_same_rate.SWEEP_SEED not in to_the_same_rate.SEEDS
        used: list[tuple[str, float | None]] = []

        def attempt(name: str, best: float, config: Any) -> tuple[float, dict[str, Any]]:
            if config.seed != to_the_same_rate.SWEEP_SEED:
                used.append((name, config.learning_rate))
            return 1.0, found(config.learning_rate == best and config.epochs >= 0.5)

        monkeypatch.setattr(to_the_same_rate, "_nest", lambda _w, c: attempt("nest", 0.2, c))
        monkeypatch.setattr(to_the_same_rate, "_lora", lambda _w, c: attempt("lora", 3e-3, c))
        _, reached, figures = to_the_same_rate.times(CPU)
        assert reached
        assert set(used) == {("nest", 0.2), ("lora", 3e-3)}
        assert (figures["nest learning rate"], figures["lora learning rate"]) == (0.2, 3e-3)


class TestTables:
    def test_render(self) -> None:
        first = content(
            line("R1"),
            line("R2", ratio=0.9),
            line("R8", "fail", ratio=0.0123),
            line("R3m", ci95=(0.5, 0.5)),
            line("R5c", ratio=0.00123, ci95=(0.001, 0.002)),
        )
        first["main_job"] = [
            {"name": "nest --help", "value": 0.165, "unit": "s", "target": "< 0.5"}
        ]
        text = tables.render({"cpu": first})
        assert "**CPU**: a processor, 2 cores; python 3.11, torch 2.13; commit abc1234." in text
        rows = text.splitlines()
        assert "| R1 | ours / theirs | 0.500 | 0.400 to 0.600 | <= 0.80 | met |" in rows
        assert "| R2 | ours / theirs | 0.900 | 0.400 to 0.600 | <= 0.80 | missed |" in rows
        assert "| R8 | ours / theirs | invalid |  | <= 0.80 | invalid |" in rows
        assert "| R3m | ours / theirs | 0.500 |  | <= 0.80 | met |" in rows
        assert "| R5c | ours / theirs | 0.00123 | 0.00100 to 0.00200 | <= 0.80 | met |" in rows
        assert "| nest --help | 0.165 s | < 0.5 s | met |" in rows
        assert "0.0123" not in text

    def test_both_devices_or_none(self) -> None:
        both = tables.render({"cpu": content(line()), "gpu": content(line())})
        assert both.count("| R1 |") == 2 and "**GPU**" in both
        assert "No result file" in tables.render({})
        assert tables.load(Path("/nonexistent")) == {}

    def test_only_what_is_between_the_markers_changes(self) -> None:
        text = f"before\n{tables.START}\nold\n{tables.END}\nafter"
        found = tables.updated(text, {"cpu": content(line())})
        assert found.startswith(f"before\n{tables.START}\n") and found.endswith("\nafter")
        assert "old" not in found and "| R1 |" in found
        assert tables.updated(found, {"cpu": content(line())}) == found

    def test_plot(self, tmp_path: Path) -> None:
        results = {"cpu": content(line("R1"), line("R9", "fail", target=">= 3", ratio=4.0))}
        results["gpu"] = content(line("R5c", ratio=0.001, ci95=(0.0009, 0.0012)))
        first, second = tmp_path / "first.png", tmp_path / "second.png"
        tables.plot(results, first)
        tables.plot(results, second)
        assert first.read_bytes() == second.read_bytes()
        assert tables.is_plotted(results, first)
        assert not tables.is_plotted({"cpu": content(line("R2"))}, first)
        assert not tables.is_plotted(results, tmp_path / "none.png")

    def test_the_readme_is_up_to_date(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["tables", "--check"])
        with pytest.raises(SystemExit) as stop:
            tables.main()
        assert stop.value.code == 0

    def test_a_readme_out_of_date_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tables, "load", lambda: {"cpu": content(line("R77"))})
        monkeypatch.setattr("sys.argv", ["tables", "--check"])
        with pytest.raises(SystemExit) as stop:
            tables.main()
        assert "make tables" in str(stop.value.code)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_have_the_schema(path: Path) -> None:
    assert path.stem in tables.DEVICES
    check_schema(json.loads(path.read_text(encoding="utf-8")))


def check_schema(found: dict[str, Any]) -> None:
    assert {"machine", "versions", "commit", "ratios"} <= set(found)
    assert found["commit"]
    keys = {"id", "name", "ratio", "ci95", "target", "gate", "samples"}
    for entry in found["ratios"]:
        assert keys <= set(entry)
        assert entry["gate"] in ("pass", "fail")
        assert len(entry["ci95"]) == 2 and entry["samples"] >= 1
        assert tables.verdict(entry) in tables.COLOURS
    ids = [entry["id"] for entry in found["ratios"]]
    assert len(ids) == len(set(ids))
    for entry in found.get("main_job", []):
        assert {"name", "value", "unit", "target"} <= set(entry)
        tables.holds(entry["value"], entry["target"])


class FakeWorld:
    def __init__(self, device: torch.device) -> None:
        pass


def found(good: bool) -> dict[str, Any]:
    return {"wrapped": 0.01 if good else 0.5, "over_refusal": 0.0, "exact_match": 1.0}


def few(made: Any, device: torch.device, **_settings: Any) -> dict[str, list[float]]:
    """`interleaved`, three times only."""
    return protocol.interleaved(made, device, repeats=3, warm_up=0)


def keep_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model that an arm makes, as `.made`."""

    class Kept:
        made: torch.nn.Module

    real = arms.Shape.model

    def model(self: Any, device: torch.device, seed: int = 0) -> torch.nn.Module:
        Kept.made = real(self, device, seed)
        return Kept.made

    monkeypatch.setattr(arms.Shape, "model", model)
    return Kept


def keep_updates(monkeypatch: pytest.MonkeyPatch) -> list[ClusterUpdate]:
    """Every update that is made trainable."""
    kept: list[ClusterUpdate] = []
    real = ClusterUpdate.attach

    def attach(self: ClusterUpdate) -> Any:
        kept.append(self)
        return real(self)

    monkeypatch.setattr(ClusterUpdate, "attach", attach)
    return kept
