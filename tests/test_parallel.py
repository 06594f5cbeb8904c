"""Experts on many ranks, as real processes on this machine: what one process computes, for every byte accounted for."""

import copy
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from torch.distributed.run import parse_args
from torch.multiprocessing.spawn import ProcessException

from dsv2_ref import DeepseekV2Config, DeepseekV2DecoderLayer, DeepseekV2ForCausalLM, MoEGate, loading, ops
from dsv2_ref.__main__ import main
from dsv2_ref.accounting import Call
from dsv2_ref.accounting.communication import (
    bytes_per_token,
    exchange_bytes,
    most_ranks_reached,
    on_ranks,
    rank_weight_bytes,
    ranks_reached,
)
from dsv2_ref.capacity import devices_reached
from dsv2_ref.optimizer_state import OptimizerState
from dsv2_ref.parallel import Ranks, average_gradients, parallelize_experts, share_experts
from dsv2_ref.quantize import quantize
from experiments import parallel as experiment
from experiments.processes import together
from tests import ranks as cases
from tests.examples import thorough

ROOT = Path(__file__).resolve().parent.parent
Found = list[dict[str, Any]]

ROUNDING = {torch.float64: 1e-12, torch.bfloat16: 2**-6}
"""Largest difference, over the largest value: sums of some tens of terms in another order in float64; in bfloat16, of 8
bits, each rank's part is rounded once more, and so is what is made of it in the layer and its gradients."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, marks=pytest.mark.slow),
        2,
        *thorough(4),
        pytest.param(8, marks=pytest.mark.slow),
    ],
)
def found(request: pytest.FixtureRequest) -> tuple[int, Found]:
    """All cases on so many ranks, started once."""
    return request.param, together(request.param, cases.all_cases, list(cases.CASES), timeout=60)


def in_one_process(name: str, ranks: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    case = cases.CASES[name]
    module = case.build()
    return module, cases.train(case, case.batch(ranks), module)


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))


def differences(name: str, found: Found) -> dict[str, float]:
    """Between the ranks and one process: of outputs, of gradients of inputs and of all weights, and of the norm."""
    module, wanted = in_one_process(name, len(found))
    told = [one[name] for one in found]
    differ = {"out": difference(torch.cat([one["out"] for one in told]), wanted["out"])}
    if wanted["x"] is not None:
        differ["x"] = difference(torch.cat([one["x"] for one in told]) / len(found), wanted["x"])
    whole = cases.gradients(module)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    seen = set()
    for one in told:
        for weight, gradient in one["gradients"].items():
            assert gradient.shape == whole[weight].shape
            wrong = float((gradient.double() - whole[weight].double()).abs().max()) / largest
            differ[weight] = max(differ.get(weight, 0.0), wrong)
            seen.add(weight)
    assert seen == whole.keys()
    norm = torch.nn.utils.get_total_norm([gradient.double() for gradient in whole.values()])
    differ["norm"] = max(difference(one["norm"], norm) for one in told)
    for ours, theirs in zip(told[0]["gates"], wanted["gates"], strict=True):
        differ["bias"] = float((ours - theirs).abs().max())
    return differ


@pytest.mark.parametrize("name", cases.CASES)
def test_ranks_compute_what_one_process_does(name: str, found: tuple[int, Found]) -> None:
    differ = differences(name, found[1])
    most = ROUNDING[cases.CASES[name].dtype]
    assert not {what: size for what, size in differ.items() if not size <= most}


def test_the_cases_are_what_their_names_say(found: tuple[int, Found]) -> None:
    ranks, told = found

    def rows_to(rank: int, name: str) -> int:
        return sum(one[name]["sent"][1][rank] for one in told)  # the second exchange is that of rows

    assert rows_to(0, "a rank that receives nothing") == 0 or ranks < 8
    held = 16 // ranks
    assert all(
        rows_to(rank, "all tokens to one rank") == 0 for rank in range(ranks) if rank not in (4 // held, 5 // held)
    )
    rows = [one["greedy"]["out"].shape[0] for one in told]
    assert len(set(rows)) == min(ranks, 3)
    if ranks > 1:
        assert sum(map(sum, (one["dropping"]["sent"][-1] for one in told))) > 0


def test_sequences_that_are_not_exempt_lose_some_experts(found: tuple[int, Found]) -> None:
    case = cases.CASES["dropping"]
    without = cases.train(replace(case, dropping=False), case.batch(found[0]), case.build())
    out = torch.cat([one["dropping"]["out"] for one in found[1]])
    same = ((out - without["out"]).abs() < 1e-12).flatten(1).all(dim=1)
    exempt = torch.rand(len(same), generator=torch.Generator().manual_seed(7)) < 0.3
    assert same.tolist() == exempt.tolist()


def test_state_dicts_of_all_ranks_together_are_the_published_one(found: tuple[int, Found]) -> None:
    whole = cases.CASES["a model"].build().state_dict()
    experts = {name for name in whole if ".experts." in name}
    held = [{name for name in one["a model"]["state"] if ".experts." in name} for one in found[1]]
    assert set().union(*held) == experts
    assert sum(map(len, held)) == len(experts)
    assert all(
        set(one["a model"]["state"]) - own == set(whole) - experts for one, own in zip(found[1], held, strict=True)
    )


FOUND_IN = {
    "pooled losses of each rank alone": "groups, and losses over all tokens",
    "losses of sequences by each rank's own number": "groups, and losses for each sequence",
    "every rank drops for itself": "dropping",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", cases.FAULTS)
def test_a_planted_fault_is_found(fault: str) -> None:
    name = FOUND_IN.get(fault, "greedy")
    if fault in cases.OVERFULL:
        with pytest.raises(ProcessException):
            together(2, cases.with_fault, fault, name, timeout=3)
    else:
        told = together(2, cases.with_fault, fault, name, timeout=30)
        assert max(differences(name, told).values()) > 1e-3


@pytest.mark.parametrize(
    "variant",
    [{}, {"_attn_implementation": "eager"}, {"mla_form": "absorbed"}, {"use_mla": False}, {"q_lora_rank": 8}],
    ids=str,
)
@pytest.mark.parametrize("around", [nullcontext, ops.plain], ids=["as chosen", "plain"])
def test_no_sequences_pass_through_every_attention(variant: dict[str, Any], around: Any) -> None:
    """As on a rank that has run out of them; alone, a layer without tokens is a mistake."""
    model = DeepseekV2ForCausalLM(replace(cases.SIZES, **variant)).eval()
    with pytest.raises(ValueError, match="at least one token"):
        model(cases.IDS[:0])
    for gate in (part for part in model.modules() if isinstance(part, MoEGate)):
        gate.ranks = Ranks("experts", 0, 1, None, 1)
    with around():
        logits, _ = model(cases.IDS[:0])
    assert logits.shape == (0, 5, cases.SIZES.vocab_size)
    logits.sum().backward()
    assert all(not weight.grad.any() for weight in model.parameters())
    layer = model.model.layers[1]
    assert layer(torch.empty(0, 5, 16))[0].shape == layer.mlp(torch.empty(0, 5, 16)).shape == (0, 5, 16)
    for call in (lambda: model(cases.IDS[:, :0]), lambda: layer.self_attn(torch.empty(0, 5, 16))):
        with pytest.raises(ValueError, match="at least one token"):
            call()


def test_what_cannot_be_shared_is_rejected_on_every_rank() -> None:
    said = together(4, cases.refusals, timeout=30)
    alike = "wanted one configuration, dtype and mode on all 4 ranks"
    same = "than on the first; wanted the same weights on all ranks, by one seed or from one checkpoint"
    wanted = {
        "configuration": f"module is another on rank 1 than on rank 0; {alike}",
        "dtype": f"module is another on rank 2 than on rank 0; {alike}",
        "mode": f"module is another on rank 2 than on rank 0; {alike}",
        "experts": "number of ranks is 4; wanted a divisor of the 17 experts",
        "groups": "number of ranks is 4; wanted a divisor of n_group=2, so that each rank takes whole groups",
        "no experts": "module is a Linear; wanted one with routed experts",
        "seed": f"gate.weight is another on rank 1 {same}",
        "one element": f"shared_experts.up_proj.weight is another on rank 3 {same}",
        "bias": f"gate.e_score_correction_bias is another on ranks 1, 2, 3 {same}",
        "experts of a set": f"experts.down_proj is another on rank 3 {same}",
    }
    for rank, one in enumerate(said):
        assert one.pop("replicas") == (
            f"replicas are ranks {[rank // 2 * 2, rank // 2 * 2 + 1]}; "
            "wanted a rank of each group, at the place that this one has in its own"
        )
    shares = [{"share": "module has experts of another rank on rank 3; wanted its own on each rank"} for _ in range(4)]
    shares[3] = {"share": "module has experts of rank 0 of 4; wanted those of rank 3 of 4"}
    assert said == [wanted | share for share in shares]


def test_a_gradient_that_one_rank_lacks_is_0_there() -> None:
    first, second = together(2, cases.some_without_gradients, timeout=30)
    for number, name in enumerate(first):
        own = name.startswith("experts.")
        wanted = [(3.0, 3.0), (6.0, 6.0), (None, None)][number % 3]
        if own:  # an expert has the sum of all ranks already
            wanted = [(3.0, 0.0), (3.0, 3.0), (None, None)][number % 3]
        assert (first[name], second[name]) == wanted, name


@pytest.mark.skipif(sys.platform != "linux", reason="reads the tables of Linux")
def test_nothing_listens_but_on_localhost() -> None:
    for addresses in together(2, cases.listening, timeout=30):
        assert set(addresses) == {"0100007F"}  # 127.0.0.1


# Bytes


@pytest.mark.parametrize(("ranks", "seed"), [(2, 0), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_every_byte_is_counted(ranks: int, seed: int) -> None:
    found = together(ranks, cases.counted, seed, timeout=60)
    assert {call["mode"] for call in found[0]} == {None, "full", "selective"}
    for calls in zip(*found, strict=True):
        config = DeepseekV2Config(**calls[0]["config"])
        held = config.n_routed_experts // ranks
        rows, choices = ([[0] * ranks for _ in range(ranks)] for _ in range(2))
        for sender, call in enumerate(calls):
            for idx, weight in zip(call["idx"].tolist(), call["weight"].tolist(), strict=True):
                homes = [expert // held for expert, w in zip(idx, weight, strict=True) if w != 0]
                for home in homes:
                    choices[sender][home] += 1
                for home in set(homes):
                    rows[sender][home] += 1
        dtype = Call(dtype=calls[0]["dtype"])
        for training in (False, True):
            measured = [[sum(bytes) for bytes in zip(*_all(call, training), strict=True)] for call in calls]
            for rank in range(ranks):
                measured[rank][rank] = 0  # what stays at home does not travel
            mode = calls[0]["mode"] if training else None
            assert measured == exchange_bytes(config, dtype, rows, choices, training, mode)


def _all(call: dict[str, Any], training: bool) -> list[list[int]]:
    return call["forward"] + call["backward"] * training


def test_expected_numbers_of_ranks_are_those_of_random_scores() -> None:
    """Of 20,000 random rankings; the largest standard error of a mean is that of a variance of a few ranks squared."""
    grouped = replace(cases.GROUPED, num_experts_per_tok=5)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, 16, generator=generator)
    for limit in (1, 2, 3, 5, 8):
        best = scores.view(-1, 8, 2).amax(-1).topk(limit).indices
        open_ = torch.zeros(len(scores), 8, dtype=torch.bool).scatter(1, best, True).repeat_interleave(2, 1)
        idx = scores.masked_fill(~open_, -1).topk(min(5, 2 * limit)).indices
        config = replace(grouped, topk_group=limit, num_experts_per_tok=min(5, 2 * limit))
        for ranks in (1, 2, 4, 8):
            reached = devices_reached(idx, 16, ranks).double()
            error = 5 * reached.std() / len(scores) ** 0.5 + 1e-9
            assert abs(reached.mean() - ranks_reached(config, ranks)) <= error
            assert reached.max() == most_ranks_reached(config, ranks)


def test_bytes_per_token_are_the_mean_and_the_most_of_counted_calls() -> None:
    """One token on each of 8 ranks whose experts are all elsewhere, and as far apart as may be."""
    config, call = DeepseekV2Config.deepseek_v2(), Call()
    rows = [[0] * 8 for _ in range(8)]
    choices = [[0] * 8 for _ in range(8)]
    for rank in range(8):
        for other in (1, 2, 3):
            rows[rank][(rank + other) % 8], choices[rank][(rank + other) % 8] = 1, 2
    sent = [sum(row) for row in exchange_bytes(config, call, rows, choices)]
    assert sent == [2 * 3 * 5120 * 2 + 6 * (4 + 8) + 7 * 16] * 8
    told = bytes_per_token(config, call, 8)
    assert told["most"] == sent[0] - 7 * 16
    assert told["expected"] < told["most"]
    assert bytes_per_token(config, call, 1) == {"expected": 0, "most": 0}
    assert bytes_per_token(DeepseekV2Config.deepseek_v3(), call, 8).keys() == {"most"}


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_holds_the_weights_that_are_counted(ranks: int) -> None:
    model = cases.CASES["a model"]
    held = share_experts(model.build(), 1, ranks)
    size = sum(weight.nbytes for weight in held.parameters())
    assert size == sum(rank_weight_bytes(model.config, Call(dtype="float64"), ranks).values())
    adam = torch.optim.AdamW(held.parameters())
    for weight in held.parameters():
        weight.grad = torch.zeros_like(weight)
    adam.step()
    states = sum(x.nbytes for state in adam.state.values() for x in state.values() if x.ndim)
    told = on_ranks(model.config, Call(dtype="float64"), ranks, None, training=True)
    assert [told[name] for name in ("weights", "gradients", "master weights", "optimizer")] == [size, size, 0, states]


def test_the_command_tells_what_each_rank_holds_and_sends(capsys: pytest.CaptureFixture[str]) -> None:
    config, call = DeepseekV2Config.deepseek_v2(), Call(seq=16, kv=16)
    command = ["account", "--preset", "deepseek_v2", "--seq", "16", "--ranks", "8"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["bytes"]["on_each_rank"]
    assert told["weights"] == sum(rank_weight_bytes(config, call, 8).values())
    sent = bytes_per_token(config, call, 8)
    assert told["sent per token, most"] == 59 * sent["most"]
    assert told["sent per token, expected"] == pytest.approx(59 * sent["expected"])
    assert main([*command, "--json", "--training", "--checkpointing"]) == 0
    told = json.loads(capsys.readouterr().out)["bytes"]["on_each_rank"]
    assert told["sent per token, most"] == 59 * bytes_per_token(config, call, 8, True, "full")["most"]
    assert main([*command, "--layer", "0"]) == 0
    assert re.search(
        r"bytes on each rank, which receives as many as it sends\n  weights +\d.*\n  sent per token, most +0  0 B",
        capsys.readouterr().out,
    )
    assert main([*command[:-1], "7"]) == 2
    assert capsys.readouterr().err == "ranks is 7; wanted a divisor of the 160 experts\n"


def test_communication_wants_ranks_that_can_share() -> None:
    with pytest.raises(ValueError, match="ranks is 3; wanted a divisor of the 160 experts"):
        ranks_reached(DeepseekV2Config.deepseek_v2(), 3)
    with pytest.raises(
        ValueError, match="n_routed_experts is None; wanted a number of experts, which ranks could share"
    ):
        most_ranks_reached(replace(DeepseekV2Config.card(), n_routed_experts=None), 1)
    with pytest.raises(ValueError, match="ranks is 16; wanted a divisor of n_group=8"):
        rank_weight_bytes(DeepseekV2Config.deepseek_v2(), Call(), 16)
    with pytest.raises(ValueError, match="topk_method is 'noaux_tc'; wanted one that judges a group by its best"):
        ranks_reached(DeepseekV2Config.deepseek_v3(), 8)


@pytest.mark.parametrize(
    ("rows", "choices", "said"),
    [
        (None, None, "rows is None; wanted for each rank a list of integers, 0 or more, one for each rank"),
        ([[0, 1]], [[0, 1]], "rows is a list of 1; wanted for each rank a list"),
        ([[0, 1], [0]], [[0, 1], [0, 0]], "rows is a list of 2; wanted for each rank a list"),
        ([[0, 1], [1, 0]], [[0, 1]], "choices is a list of 1; wanted for each rank a list"),
        ([[0, -1], [1, 0]], [[0, 1], [1, 0]], "rows is a list of 2; wanted .* 0 or more"),
        ([[0, 1.5], [1, 0]], [[0, 2], [1, 0]], "rows is a list of 2; wanted .* integers"),
        ([[0, 9], [1, 0]], [[0, 1], [1, 0]], "choices is 1; wanted from 9 to 54: each of 9 tokens has 1 to 6 experts"),
        ([[0, 1], [1, 0]], [[0, 7], [1, 0]], "choices is 7; wanted from 1 to 6: each of 1 tokens has 1 to 6 experts"),
        ([[0] * 3] * 3, [[0] * 3] * 3, "ranks is 3; wanted a divisor of the 160 experts"),
    ],
)
def test_counts_that_no_ranks_could_send_are_rejected(rows: Any, choices: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        exchange_bytes(DeepseekV2Config.deepseek_v2(), Call(), rows, choices)


def test_no_training_step_sends_for_a_cache() -> None:
    v2, call = DeepseekV2Config.deepseek_v2(), Call(kv=5)
    for sent in (
        lambda: bytes_per_token(v2, call, 8, training=True),
        lambda: exchange_bytes(v2, call, [[0]], [[0]], training=True),
    ):
        with pytest.raises(ValueError, match="kv is 5; wanted the 1 new tokens: training has no cache"):
            sent()
    with pytest.raises(ValueError, match="checkpointing is 'full'; wanted None where nothing is trained"):
        bytes_per_token(v2, Call(), 8, checkpointing="full")


# Checkpoints


@pytest.mark.parametrize("kind", ["layer", "model"])
def test_a_rank_reads_only_its_experts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cases.CASES["a model"].build().float()
    model.save_pretrained(tmp_path, 5_000)
    whole, read = model.state_dict(), []
    plain_read = loading.read_tensor
    monkeypatch.setattr(loading, "read_tensor", lambda entry: read.append(entry.name) or plain_read(entry))
    names: list[str] = []
    for rank in range(4):
        read.clear()
        if kind == "layer":
            part = DeepseekV2DecoderLayer.from_pretrained(tmp_path, 1, experts_of=(rank, 4))
        else:
            part = DeepseekV2ForCausalLM.from_pretrained(tmp_path, experts_of=(rank, 4))
        prefix = "model.layers.1." if kind == "layer" else ""
        assert set(read) == {prefix + name for name in part.state_dict()}
        assert all(torch.equal(weight, whole[prefix + name]) for name, weight in part.state_dict().items())
        own = [name for name in read if ".experts." in name]
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in own} == set(range(4 * rank, 4 * rank + 4))
        names += own
    layers = 1 if kind == "layer" else 2
    assert len(names) == len(set(names)) == layers * 16 * 3


def test_experts_of_one_rank_do_not_compute_alone(tmp_path: Path) -> None:
    cases.CASES["a model"].build().save_pretrained(tmp_path)
    part = DeepseekV2ForCausalLM.from_pretrained(tmp_path, experts_of=(1, 2))
    with pytest.raises(RuntimeError, match="one rank's share; wanted parallelize_experts first"):
        part(torch.tensor([[1, 2, 3]]))
    for wrong in ((2, 2), (-1, 2), (0, 0), ("0", "1"), 5, (0,), (0, 1, 2), "01"):
        with pytest.raises(ValueError, match=r"experts_of is .*; wanted a rank, from 0, and the number of ranks"):
            DeepseekV2ForCausalLM.from_pretrained(tmp_path, experts_of=wrong)
    for wrong in (1, (1,), (0, 2, 3), "12"):
        with pytest.raises(ValueError, match=r"experts_of is .*; wanted a rank, from 0, and the number of ranks"):
            DeepseekV2ForCausalLM.from_pretrained(tmp_path, experts_of=wrong)
    with pytest.raises(ValueError, match=r"experts_of is .*; wanted None for quantised experts"):
        DeepseekV2ForCausalLM.from_pretrained(tmp_path, experts_of=(0, 2), weights="int8")
    quantize(cases.CASES["a model"].build(), "int8", parts=["experts"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts_of is .*; wanted None for quantised experts"):
        DeepseekV2ForCausalLM.from_pretrained(tmp_path, experts_of=(0, 2))


@pytest.mark.parametrize("codes", [(), ("attention", "mlp")], ids=["plain", "codes beside plain experts"])
def test_ranks_that_read_their_experts_compute_what_the_whole_model_does(
    codes: tuple[str, ...], tmp_path: Path
) -> None:
    whole = cases.CASES["a model"].build()
    if codes:
        quantize(whole, "int8", parts=codes)
    whole.save_pretrained(tmp_path)
    model = DeepseekV2ForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(cases.IDS)[0]
    for rank, (out, said) in enumerate(together(2, cases.read_and_run, str(tmp_path), timeout=30)):
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        assert said == f"module has experts of rank {1 - rank} of 2; wanted those of rank {rank} of 2"


def test_all_ranks_together_save_what_one_process_reads(tmp_path: Path) -> None:
    for rank, (said, moved) in enumerate(together(2, cases.saved, str(tmp_path), timeout=30)):
        assert said.startswith(f"the model has the experts of rank {rank} of 2; wanted all of them: torch.distributed.")
        assert all(not weight.any() for weight in moved)
    whole = cases.CASES["a model"].build()
    wanted = {name: weight.clone() for name, weight in whole.state_dict().items()}
    for weight in whole.parameters():
        nn.init.zeros_(weight)
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.load(whole.state_dict(), checkpoint_id=tmp_path)
    assert all(torch.equal(weight, wanted[name]) for name, weight in whole.state_dict().items())


def test_a_training_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """From a checkpoint of two: as they did themselves, with their optimizers' momentum, in two, four or one."""
    wanted: dict[str, Tensor] = {}
    for held in together(2, cases.resumed, str(tmp_path), False, timeout=60):
        wanted |= held
    for ranks in (2, 4, 1):
        found: dict[str, Tensor] = {}
        for held in together(ranks, cases.resumed, str(tmp_path), True, timeout=60):
            found |= held
        assert found.keys() == wanted.keys()
        for name, weight in found.items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_an_optimizer_without_ranks_keeps_its_state(tmp_path: Path) -> None:
    """Momentum of a shape of its own, and factors of it, belong to one expert each as well."""
    for make in (
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
        lambda weights: torch.optim.Adafactor(weights),
    ):
        model = cases.CASES["a model"].build()
        optimizer = make(model.parameters())
        model(cases.IDS)[0].square().sum().backward()
        optimizer.step()
        wanted = copy.deepcopy(optimizer.state_dict()["state"])
        saved = OptimizerState(model, optimizer).state_dict()
        stacks = [name for name in saved["state"] if name.endswith("gate_up_proj")]
        assert "model.layers.1.mlp.experts.15.gate_up_proj" in stacks
        assert len(stacks) == 2 * 16  # layers with experts
        saved = copy.deepcopy(saved)
        with torch.no_grad():
            for held in optimizer.state.values():
                for value in held.values():
                    if isinstance(value, Tensor):
                        value.zero_()
        OptimizerState(model, optimizer).load_state_dict(saved)
        torch.testing.assert_close(optimizer.state_dict()["state"], wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"optimizer is None; wanted a torch\.optim\.Optimizer"):
        OptimizerState(cases.CASES["a model"].build(), None)
    with pytest.raises(TypeError, match="model is an object of 0; wanted a torch"):
        OptimizerState({}, torch.optim.SGD([nn.Parameter(torch.zeros(1))]))


def test_what_is_not_plain_is_not_shared() -> None:
    quantised = quantize(cases.CASES["greedy"].build().float(), "int8", parts=["experts"])
    with pytest.raises(ValueError, match="experts is a QuantizedExperts; wanted RoutedExperts as they were built"):
        share_experts(quantised, 0, 2)
    shared = share_experts(cases.CASES["greedy"].build(), 0, 2)
    with pytest.raises(ValueError, match="experts is a ParallelExperts"):
        share_experts(shared, 0, 2)
    with pytest.raises(ValueError, match="experts is a ParallelExperts"):
        quantize(shared, "int8", parts=["experts"])
    hooked = cases.CASES["greedy"].build()
    hooked.experts.register_forward_hook(print)
    with pytest.raises(ValueError, match="experts is a RoutedExperts; wanted RoutedExperts as they were built"):
        share_experts(hooked, 0, 2)
    for wrong in (None, {}):
        for share in (lambda w: share_experts(w, 0, 2), parallelize_experts, average_gradients):
            with pytest.raises(TypeError, match=r"module is .*; wanted a torch\.nn\.Module"):
                share(wrong)
    with pytest.raises(ValueError, match="there are no process groups; wanted torch"):
        parallelize_experts(cases.CASES["greedy"].build())


# The experiment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "run", "groups", "dropping"),
    [
        (8, "pooled", 2, False),
        *thorough((4, "bias", 2, False), (4, "bias", 1, True)),
    ],
)
def test_processes_in_one_group_or_two_train_as_one_does(ranks: int, run: str, groups: int, dropping: bool) -> None:
    log = together(ranks, cases.curves, run, groups, dropping, timeout=60)[0]
    assert log["bits"][0] > log["bits"][-1]
    assert log["bits"] == pytest.approx(
        log["alone"], abs=1e-11
    )  # three steps of Adam, which divides by small gradients


def test_torchrun_leaves_the_options_of_the_experiment_alone() -> None:
    """It rejects what could be the beginning of two of its own, also after the module."""
    options = ["--balance", "bias", "--steps", "3", "--groups", "2", "--dropping", "--timeout", "9", "--out", "folder"]
    told = parse_args(["--nproc-per-node", "2", "-m", "experiments.parallel", *options])
    assert told.training_script_args == options


@pytest.mark.slow
@pytest.mark.thorough
def test_torchrun_trains_the_router_on_four_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "experiments.parallel", "--steps", "3", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    log = json.loads((tmp_path / "parallel_log.json").read_text())
    assert log["bits"] == pytest.approx(log["alone"], abs=1e-11)
    assert log["bits"][-1] < log["bits"][0] - 0.5
    assert "4 processes through gloo" in done.stdout
    assert "largest difference of any step" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("fate", "timeout"), [("dies", "60"), *thorough(("never comes", "3"), ("hangs", "3"))])
def test_a_dead_rank_ends_the_others_with_one_line(fate: str, timeout: str, tmp_path: Path) -> None:
    start = multiprocessing.get_context("forkserver").Process
    processes = [start(target=cases.doomed, args=(rank, tmp_path, fate, timeout)) for rank in range(4)]
    begun = time.monotonic()
    for process in processes:
        process.start()
    try:
        for rank in (0, 2, 3):
            processes[rank].join(50)
            assert processes[rank].exitcode == 1
            said = (tmp_path / f"{rank}.txt").read_text()
            assert re.fullmatch(f"process {rank} of 4 ends: .+\n", said), said
        assert time.monotonic() - begun < 50  # less than the 60 seconds that a living rank may take
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "wanted torchrun, which starts the processes: torchrun --nproc-per-node 4 -m experiments.parallel"),
        (["--groups", "0"], "argument --groups: 0; wanted at least 1"),
        (["--steps", "-1"], "argument --steps: -1; wanted at least 1"),
        (["--timeout", "nan"], "argument --timeout: nan; wanted at least 1"),
    ],
)
def test_what_the_experiment_cannot_do_is_rejected(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        experiment.main(options)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the tables of Linux")
def test_no_process_is_left() -> None:
    """Of those that the server of processes has forked; it is the last test of this file."""
    assert multiprocessing.active_children() == []
    server = forkserver._forkserver._forkserver_pid
    children = [Path(f"/proc/{task.name}/stat") for task in Path("/proc").iterdir() if task.name.isdigit()]
    parents = [int(stat.read_text().rsplit(")", 1)[1].split()[1]) for stat in children if stat.exists()]
    assert server is not None
    assert parents.count(server) == 0
