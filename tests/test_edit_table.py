"""Whatever a user does to an edited pipeline: an edit does what is right, or is refused by reason.

Each event of `EVENTS` happens before `apply`, between `apply` and `revert`, and inside `applied`.
A cell is right when the weights are what a user may expect, bit for bit unless it says otherwise;
it is refused when one ValueError says why, and nothing was changed.
"""

import copy
import io
import pickle
import threading

import pytest
import torch
from conftest import build_tiny_sd
from diffusers import StableDiffusionPipeline

import loco_core as loco
from loco_core.closed_form.solver import fit
from loco_core.edits.edit import make_edit
from loco_core.edits.knockout import Knockout

KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
VALUE = KEY.replace("to_k", "to_v")
WORDS = "text_encoder.encoder.layers.1.self_attn.out_proj.weight"
GONE = pytest.mark.filterwarnings("ignore:.*changes nothing")


def rows(seed: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def a_map(pipe):
    change = fit(rows(0), rows(1), 0.01)
    return make_edit(pipe, dict.fromkeys((KEY, VALUE, WORDS), change), method="test")


def a_knockout(pipe):
    changes = {}
    for name in (KEY, VALUE, WORDS):
        shape = tuple(weight(pipe, name).shape)
        changes[name] = Knockout(shape, torch.arange(0, shape[0] * shape[1], 3))
    return make_edit(pipe, changes, method="test")


def weight(pipe, name):
    module = getattr(pipe, name.partition(".")[0]).get_submodule(name.split(".", 1)[1][:-7])
    return getattr(module, "base_layer", module).weight


def seen(pipe) -> dict[str, torch.Tensor]:
    return {name: weight(pipe, name).detach().clone() for name in (KEY, VALUE, WORDS)}


def same(a, b) -> bool:
    return all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def near(a, b, step: float = 1e-6) -> bool:
    return all(torch.allclose(a[n], b[n], rtol=0, atol=step) for n in a)


def as_if_never_edited(pipe, wanted, event, kind) -> bool:
    """Bit for bit; but a knocked-out entry, rounded, is still 0: it comes back unrounded."""
    if (event, kind) == (bfloat16_and_back, a_knockout):
        return near(seen(pipe), seen(wanted), 2**-8)
    return same(seen(pipe), seen(wanted))


# --- the events: what is done to a pipeline, and what its weights then are made of


def deep_copied(pipe):
    return copy.deepcopy(pipe)


def pickled(pipe):
    return pickle.loads(pickle.dumps(pipe))


def saved_by_torch(pipe):
    blob = io.BytesIO()
    torch.save(pipe.unet, blob)
    blob.seek(0)
    pipe.unet = torch.load(blob, weights_only=False)
    return pipe


def adapter(pipe):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe.unet.add_adapter(config, "one")


def lora_loaded(pipe):
    adapter(pipe)
    return pipe


def lora_fused(pipe):
    adapter(pipe)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    return pipe


def other_state_dict(pipe):
    pipe.unet.load_state_dict(build_tiny_sd(seed=3).unet.state_dict())
    return pipe


def own_state_dict(pipe):
    pipe.unet.load_state_dict(build_tiny_sd().unet.state_dict())
    return pipe


def bfloat16_and_back(pipe):
    return pipe.to(torch.bfloat16).to(torch.float32)


def to_bfloat16(pipe):
    return pipe.to(torch.bfloat16)


def to_float64(pipe):
    return pipe.to(torch.float64)


def by_network(pipe):
    from accelerate import cpu_offload_with_hook

    hook = None
    for network in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = cpu_offload_with_hook(network, "cpu", prev_module_hook=hook)
    return pipe


def sequential(pipe):
    from accelerate import cpu_offload

    for network in (pipe.text_encoder, pipe.unet):
        cpu_offload(network, "cpu", offload_buffers=len(network._parameters) > 0)
    return pipe


def in_groups(pipe):
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    return pipe


def shared(pipe):
    """The same networks in a second pipeline."""
    return StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)


def one_entry_by_hand(pipe):
    with torch.no_grad():
        weight(pipe, VALUE)[0, 0] += 1e-6
    return pipe


EVENTS = [deep_copied, pickled, saved_by_torch, lora_loaded, lora_fused, other_state_dict,
          own_state_dict, bfloat16_and_back, to_bfloat16, to_float64, by_network, sequential,
          in_groups, shared, one_entry_by_hand]  # fmt: skip

#: What an event does to an edit that is to be applied after it. Else it is right.
APPLY = {
    "lora_loaded": "wrapped by a LoRA adapter: call pipe.unload_lora_weights",
    "lora_fused": "made for other weights .*1 of 3 differ",
    "other_state_dict": "made for other weights .*2 of 3 differ",
    "sequential": "is offloaded: load the pipeline without sequential CPU offload",
}
#: And to an edit that is on when it happens. Else it comes off.
REVERT = {
    "lora_fused": "1 of 3 weights, such as .*to_k.weight, were changed by .*subtract=True",
    "other_state_dict": "2 of 3 weights, .*were changed by something else",
    "one_entry_by_hand": "1 of 3 weights, such as .*to_v.weight, were changed by something else",
    "sequential": r"was offloaded since .*pipe\.remove_all_hooks\(\)",
}


@pytest.fixture(params=[a_map, a_knockout], ids=lambda f: f.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=EVENTS, ids=lambda f: f.__name__)
def event(request):
    return request.param


def test_apply_after(event, kind):
    edit = kind(build_tiny_sd())
    pipe = event(build_tiny_sd())
    if event.__name__ in APPLY:
        before = None if event is sequential else seen(pipe)
        with pytest.raises(ValueError, match=APPLY[event.__name__]):
            edit.apply(pipe)
        assert before is None or same(seen(pipe), before)
        return
    if event is one_entry_by_hand:  # less than the rounding of both marks: the same checkpoint
        edit.apply(pipe)
        return
    before = seen(pipe)
    edit.apply(pipe)
    for name, change in edit.changes.items():
        assert torch.equal(weight(pipe, name), change.apply_to(before[name]))
        assert not torch.equal(weight(pipe, name), before[name])
    edit.revert(pipe)
    assert same(seen(pipe), before)


def test_revert_after(event, kind):
    pipe = build_tiny_sd()
    edit, wanted = kind(pipe), event(build_tiny_sd())
    edit.apply(pipe)
    pipe = event(pipe)
    if event.__name__ in REVERT:
        before = None if event is sequential else seen(pipe)
        with pytest.raises(ValueError, match=REVERT[event.__name__]):
            edit.revert(pipe)
        assert before is None or same(seen(pipe), before)
    else:
        edit.revert(pipe)
        assert as_if_never_edited(pipe, wanted, event, kind)
        with pytest.raises(ValueError, match="is not applied to this pipeline"):
            edit.revert(pipe)


def test_applied_around(event, kind):
    pipe = build_tiny_sd()
    edit, wanted = kind(pipe), event(build_tiny_sd())
    if event.__name__ in REVERT:
        with pytest.raises(ValueError, match=REVERT[event.__name__]), edit.applied(pipe):
            event(pipe)
        with pytest.raises(KeyboardInterrupt) as stopped, edit.applied(other := build_tiny_sd()):
            event(other)
            raise KeyboardInterrupt
        assert "the edit is still on" in stopped.value.__notes__[0]
    elif event in (deep_copied, pickled):
        with edit.applied(pipe):
            twin = event(pipe)
        assert same(seen(pipe), seen(wanted)) and not same(seen(twin), seen(wanted))
        edit.revert(twin)
        assert same(seen(twin), seen(wanted))
    else:
        with pytest.raises(KeyboardInterrupt) as stopped, edit.applied(pipe):
            event(pipe)
            raise KeyboardInterrupt
        assert not hasattr(stopped.value, "__notes__")
        assert as_if_never_edited(pipe, wanted, event, kind)


# --- what can be done where it is refused


def test_subtraction_takes_the_edit_off_and_leaves_a_fused_lora(kind):
    pipe, wanted = build_tiny_sd(), seen(lora_fused(build_tiny_sd()))
    edit = kind(pipe)
    edit.apply(pipe)
    lora_fused(pipe)
    edit.revert(pipe, subtract=True)
    assert near(seen(pipe), wanted)
    assert torch.equal(weight(pipe, VALUE), wanted[VALUE])  # what nobody else changed: bit for bit


def test_an_unfused_lora_leaves_rounding_that_subtraction_takes_off():
    pipe, before = build_tiny_sd(), seen(build_tiny_sd())
    edit = a_map(pipe)
    with pytest.raises(ValueError, match="subtract=True"), edit.applied(pipe):
        adapter(pipe)
        pipe.fuse_lora(components=["unet"])
        pipe.unfuse_lora(components=["unet"])
        pipe.unload_lora_weights()
        if same(seen(pipe), before):
            pytest.fail("fused and unfused again is bit-identical: nothing is tested")
    edit.revert(pipe, subtract=True)
    assert near(seen(pipe), before)


def test_an_offloaded_pipeline_gives_back_once_its_hooks_are_gone(kind):
    pipe, before = build_tiny_sd(), seen(build_tiny_sd())
    edit = kind(pipe)
    edit.apply(pipe)
    sequential(pipe)
    pipe.remove_all_hooks()
    edit.revert(pipe)
    assert same(seen(pipe), before)


def test_an_edit_of_reloaded_weights_is_applied_anew(kind):
    pipe = build_tiny_sd()
    edit = kind(pipe)
    edit.apply(pipe)
    edited = seen(pipe)
    for network, fresh in ((pipe.unet, "unet"), (pipe.text_encoder, "text_encoder")):
        network.load_state_dict(getattr(build_tiny_sd(), fresh).state_dict())
    edit.apply(pipe)
    assert same(seen(pipe), edited)
    edit.revert(pipe)
    assert same(seen(pipe), seen(build_tiny_sd()))


# --- pipelines made in inference mode, pipelines that share, threads


def test_a_pipeline_of_inference_tensors_is_edited_examined_and_given_back(kind):
    with torch.inference_mode():
        pipe = build_tiny_sd()
    edit, before = kind(build_tiny_sd()), seen(pipe)
    edit.apply(pipe)
    twin = copy.deepcopy(pipe.text_encoder.encoder.layers[1].self_attn.out_proj._loco_edits)
    assert twin and not torch.is_inference(twin[0].saved)
    if kind is a_map:
        assert loco.diagnose(pipe, edit).changes.keys() == edit.changes.keys()
        assert all(
            torch.equal(weight(pipe, n), edit.changes[n].apply_to(before[n])) for n in before
        )
    edit.revert(pipe)
    assert same(seen(pipe), before)


def test_pipelines_that_share_a_network_share_its_edits(kind):
    one = build_tiny_sd()
    two, before = shared(one), seen(one)
    edit = kind(one)
    edit.apply(one)
    with pytest.raises(ValueError, match="already applied"):
        edit.apply(two)
    edit.revert(two)
    assert same(seen(one), before)
    assert not loco.interventions.active.reopened(one)


def test_of_two_threads_one_applies_and_one_is_refused(kind):
    pipe, said = build_tiny_sd(), []
    edit, before = kind(pipe), seen(pipe)
    together = threading.Barrier(2)

    def work():
        together.wait()
        try:
            with edit.applied(pipe):
                together.wait(5)
        except (ValueError, threading.BrokenBarrierError) as error:
            said.append(str(error))
            together.abort()

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert any("already applied" in text for text in said)
    assert same(seen(pipe), before)


@pytest.mark.parametrize("first, then", [(a_map, a_knockout), (a_knockout, a_map)])
def test_a_copy_of_a_stack_comes_off_in_its_order(first, then):
    pipe = build_tiny_sd()
    before = seen(pipe)
    below = first(pipe)
    below.apply(pipe)
    above = then(pipe)
    above.apply(pipe)
    twin = pickled(deep_copied(pipe))
    with pytest.raises(ValueError, match="is below"):
        below.revert(twin)
    above.revert(twin)
    below.revert(twin)
    assert same(seen(twin), before) and not same(seen(pipe), before)


# --- Ctrl-C, at every moment


class _Stopper:
    """Raises KeyboardInterrupt at the nth copy into a weight."""

    def __init__(self, monkeypatch, at):
        real, self.calls = torch.Tensor.copy_, 0

        def copy_(tensor, *args, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise KeyboardInterrupt
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "copy_", copy_)


@pytest.mark.parametrize("at", range(1, 12))
def test_ctrl_c_while_it_is_put_on_or_taken_off_is_undone_or_can_be_done_again(at, monkeypatch):
    pipe = build_tiny_sd()
    before, edit = seen(pipe), a_map(pipe)
    stopper = _Stopper(monkeypatch, at)
    try:
        edit.apply(pipe)
        applied = True
    except KeyboardInterrupt:
        applied = False
        assert same(seen(pipe), before)
    try:
        edit.revert(pipe) if applied else edit.apply(pipe)
    except KeyboardInterrupt:
        edit.revert(pipe)
    monkeypatch.undo()
    assert stopper.calls >= at or at > 6
    if not applied:
        edit.revert(pipe)
    assert same(seen(pipe), before)


@pytest.mark.parametrize("at", range(1, 12))
def test_ctrl_c_while_a_change_is_subtracted_takes_it_off_of_all_weights_or_of_none(
    at, monkeypatch
):
    pipe = build_tiny_sd()
    wanted, edit = seen(pipe), a_map(pipe)
    edit.apply(pipe)
    for name in edit.changes:
        weight(pipe, name).data.mul_(1.01)
        wanted[name] = wanted[name] + 0.01 * weight(pipe, name) / 1.01
    before = seen(pipe)
    _Stopper(monkeypatch, at)
    try:
        edit.revert(pipe, subtract=True)
    except KeyboardInterrupt:
        monkeypatch.undo()
        assert same(seen(pipe), before)
        edit.revert(pipe, subtract=True)
    monkeypatch.undo()
    assert near(seen(pipe), wanted)


def test_groups_that_a_stream_carries_are_refused():
    """There is no stream on a CPU: one is put where diffusers puts it."""
    pipe = build_tiny_sd()
    edit = a_map(pipe)
    in_groups(pipe)
    hooks = [m._diffusers_hook.get_hook("group_offloading") for m in pipe.unet.modules()
             if hasattr(m, "_diffusers_hook")]  # fmt: skip
    next(hook for hook in hooks if hook).group.stream = object()
    with pytest.raises(ValueError, match="unet is offloaded in groups by a stream"):
        edit.apply(pipe)


# --- one checkpoint in two dtypes


@pytest.mark.parametrize("made, used", [("float32", "bfloat16"), ("bfloat16", "float32"),
                                        ("float32", "float16"), ("float16", "float32"),
                                        ("float64", "bfloat16")])  # fmt: skip
def test_an_edit_of_one_load_of_a_checkpoint_serves_another(made, used, tmp_path, kind):
    build_tiny_sd().save_pretrained(tmp_path / "model")
    edit = kind(loco.load(tmp_path / "model", dtype=getattr(torch, made)))
    edit.save(tmp_path / "edit")
    pipe = loco.load(tmp_path / "model", dtype=getattr(torch, used))
    before = seen(pipe)
    with loco.Edit.load(tmp_path / "edit").applied(pipe):
        assert weight(pipe, KEY).dtype == getattr(torch, used)
        assert not same(seen(pipe), before)
    assert same(seen(pipe), before)
