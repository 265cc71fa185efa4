"""A store asked after anything changed gives no wrong picture, and paints no right one again."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from conftest import build_tiny_sd, build_tiny_sdxl
from diffusers import EulerDiscreteScheduler

import loco_core as loco
from loco_core.families import family_of
from loco_core.inside import rank_neurons
from loco_core.painting import Images, Picture, Sampling, Store, brush, fit, paint
from loco_core.painting.batch import batches, paint_batch
from loco_core.painting.images import Held
from loco_core.painting.meter import metered
from loco_core.painting.state import state_of

FAST = Sampling(steps=2)
PICTURES = [Picture("a house by Van Gogh", seed) for seed in range(3)]
STYLE = loco.Concept(
    "Van Gogh", "style", ["a house by Van Gogh", "a tree by Van Gogh"], ["a house", "a tree"]
)


def painted(pipe, pictures=PICTURES, store=None, sampling=FAST, **how):
    return torch.stack(list(paint(pipe, pictures, sampling, store=store, **how)))


def counted(monkeypatch):
    """Batches that are painted from now on, as lists of pictures."""
    real, seen = brush.paint_batch, []

    def count(model, batch, *args):
        seen.append(list(batch))
        return real(model, batch, *args)

    monkeypatch.setattr(brush, "paint_batch", count)
    return seen


# --- what changes a picture changes its key


def held_neurons(pipe):
    return rank_neurons(pipe, STYLE, [8, 9], token="eos").ablated(pipe, top=20)


def with_lora(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False), "one")
    return pipe


def reversed_rows(pipe):
    weight = pipe.unet.get_submodule(loco.text_layers(pipe)[8].name).to_v.weight
    weight.data = weight.data.flip(0)


def swapped_words(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight
    ids = pipe.tokenizer("gogh house", add_special_tokens=False).input_ids
    table.data[ids] = table.data[ids[::-1]].clone()


def other_spacing(pipe):
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )


def other_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def an_edit(pipe):
    loco.locoedit(pipe, STYLE, layers=[8, 9]).apply(pipe)


def free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def softer_adapter(pipe):
    for module in pipe.unet.modules():
        if hasattr(module, "scaling"):
            module.scaling["one"] *= 0.5


CHANGES = [reversed_rows, swapped_words, other_spacing, other_scheduler, an_edit, free_u, with_lora]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_model_is_painted_anew_and_the_old_one_is_still_there(change, tmp_path):
    pipe = build_tiny_sd()
    before = painted(pipe, store=tmp_path)
    change(pipe)
    after = painted(pipe, store=tmp_path)
    assert torch.equal(after, painted(pipe))  # as without a store
    assert not torch.equal(after, before)
    assert torch.equal(painted(build_tiny_sd(), store=tmp_path), before)
    assert len(list(Store(tmp_path).entries())) == 6


def test_the_scale_of_an_adapter_is_part_of_the_state(tmp_path):
    pipe = with_lora(build_tiny_sd())
    full = painted(pipe, store=tmp_path)
    softer_adapter(pipe)
    soft = painted(pipe, store=tmp_path)
    assert torch.equal(soft, painted(pipe)) and not torch.equal(soft, full)
    pipe.unet.disable_adapters()
    assert torch.equal(painted(pipe, store=tmp_path), painted(pipe))


def test_another_dtype_is_another_state(tmp_path):
    painted(build_tiny_sd(), store=tmp_path)
    double = build_tiny_sd().to(torch.float64)
    assert torch.equal(painted(double, store=tmp_path), painted(double))
    assert len(list(Store(tmp_path).entries())) == 6


def test_held_neurons_and_routed_layers_are_part_of_the_state(tmp_path, monkeypatch):
    pipe = build_tiny_sd()
    plain = painted(pipe, store=tmp_path)
    with held_neurons(pipe):
        held = painted(pipe, store=tmp_path)
    with held_neurons(pipe):
        seen = counted(monkeypatch)
        assert torch.equal(painted(pipe, store=tmp_path), held) and not seen
    assert not torch.equal(held, plain)
    assert torch.equal(painted(pipe, store=tmp_path), plain) and not seen


def test_a_hook_of_somebody_else_is_refused_until_it_has_a_name(tiny_sd, tmp_path):
    handle = tiny_sd.unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)
    try:
        with pytest.raises(ValueError, match="unet.mid_block.*tag="):
            paint(tiny_sd, PICTURES, FAST, store=tmp_path)
        loud = painted(tiny_sd, store=Store(tmp_path, tag="twice the middle"))
        assert torch.equal(loud, painted(tiny_sd))  # without a store nothing is claimed
    finally:
        handle.remove()
    plain = painted(tiny_sd, store=tmp_path)
    assert not torch.equal(plain, loud)
    assert torch.equal(painted(tiny_sd, store=Store(tmp_path, tag="another")), plain)


# --- what does not change a picture is not painted again


def test_a_second_call_paints_nothing_whatever_the_batch_size(tiny_sd, tmp_path, monkeypatch):
    first = painted(tiny_sd, store=tmp_path, batch_size=2)
    seen = counted(monkeypatch)
    assert torch.equal(painted(tiny_sd, store=tmp_path, batch_size=3), first) and not seen
    more = [*PICTURES, Picture("a tree")]
    assert torch.equal(painted(tiny_sd, more, tmp_path)[:3], first) and seen == [[more[-1]]]


def test_methods_share_their_pictures(tiny_sd, tmp_path, monkeypatch):
    run = dict(
        seeds=[0, 1], steps=2, folder=tmp_path, score=lambda images, texts: images.mean((1, 2, 3))
    )
    loco.localize(tiny_sd, STYLE, 16, **run | {"seeds": range(3)})
    seen = counted(monkeypatch)
    loco.trace(tiny_sd, STYLE, sites=["mid_block.resnets.0"], noise=2.0, **run)
    listed = {picture for batch in seen for picture in batch}
    assert listed and not any(p.noise is None and not p.restored for p in listed)  # no clean run


def test_the_same_picture_twice_is_painted_once(tiny_sd, monkeypatch):
    seen = counted(monkeypatch)
    images = painted(tiny_sd, [PICTURES[0], PICTURES[1], PICTURES[0]])
    assert torch.equal(images[0], images[2]) and seen == [PICTURES[:2]]


def test_a_size_of_ones_own(tiny_sd, tmp_path):
    wide = loco.generate(tiny_sd, ["a house"], steps=2, height=16, width=32, folder=tmp_path)
    assert wide.shape == (1, 1, 3, 16, 32)
    own = loco.generate(tiny_sd, ["a house"], steps=2, folder=tmp_path)
    assert own.shape == (1, 1, 3, 16, 16)
    with pytest.raises(ValueError, match="give both, or neither"):
        loco.generate(tiny_sd, ["a house"], height=16)


# --- batches


def test_a_batch_has_one_clean_run_and_its_rows_count():
    site = ("mid_block.resnets.0",)
    listed = [
        Picture("a", seed, restored=restored)
        for seed in (0, 1)
        for restored in ((), site, ("mid_block.resnets.1",))
    ]
    cut = list(batches(listed, lambda: 3))
    assert cut == [listed[:3], listed[3:]]
    cut = list(batches(listed, lambda: 2))  # a clean run and one restored
    assert [len(batch) for batch in cut] == [2, 1, 2, 1]
    assert sum(cut, []) == listed


def test_memory_that_runs_out_halves_the_batch(tiny_sd, monkeypatch):
    wanted, real, sizes = painted(tiny_sd, batch_size=1), brush.paint_batch, []

    def small(model, batch, *args):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, batch, *args)

    monkeypatch.setattr(brush, "paint_batch", small)
    assert torch.equal(painted(tiny_sd, batch_size=3), wanted)
    assert sizes == [3, 2, 1, 1, 1]
    monkeypatch.setattr(
        brush, "paint_batch", lambda *args: (_ for _ in ()).throw(MemoryError("no"))
    )
    with pytest.raises(MemoryError, match="one picture does not fit.*offload"):
        painted(tiny_sd, batch_size=2)
    assert fit.out_of_memory(RuntimeError("can't allocate memory: you tried")) and not (
        fit.out_of_memory(RuntimeError("shapes do not match"))
    )


def test_what_is_painted_is_counted(tiny_sd):
    with metered(family_of(tiny_sd)) as cost:
        painted(tiny_sd)
    assert (cost.forward, cost.backward) == (3 * 2 * 2, 0)  # pictures, steps, with and without
    with metered(family_of(tiny_sd)) as cost:
        loco.attribute(tiny_sd, STYLE, steps=2)
    assert cost.backward == 2 * 2 and cost.rows == cost.forward + 2 * cost.backward


@pytest.mark.parametrize("bad, reason", [
    (Picture("a", reads=((16, "b"),)), "text layers 0 to 15"),
    (Picture("a", pooled="b"), "no pooled text"),
    (Picture("a", -1), "seed -1"),
])  # fmt: skip
def test_pictures_that_do_not_fit_are_refused_before_anything_is_painted(tiny_sd, bad, reason):
    with pytest.raises(ValueError, match=reason):
        paint(tiny_sd, [Picture("a"), bad], FAST)


def test_a_picture_that_is_not_finite_is_refused_and_never_kept(tmp_path):
    pipe = build_tiny_sd()
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite.*float32"):
        painted(pipe, store=tmp_path)
    assert not list(Store(tmp_path).entries())


def test_a_blackened_picture_is_refused(tmp_path):
    pipe = build_tiny_sd()
    pipe.run_safety_checker = lambda image, *args: (image * 0, [True] * len(image))
    with pytest.raises(ValueError, match="safety checker blackened.*safety_checker=None"):
        painted(pipe, store=tmp_path)
    assert not list(Store(tmp_path).entries())


# --- the store


def test_a_damaged_picture_is_refused_by_name(tiny_sd, tmp_path):
    painted(tiny_sd, store=tmp_path)
    entry = next(Store(tmp_path).entries())
    data, wanted = bytearray(entry.path.read_bytes()), Store(tmp_path).read(entry.path.stem)
    refused = 0
    for at in range(0, len(data), 97):
        broken = bytes(data[:at]) + bytes([data[at] ^ 1]) + bytes(data[at + 1 :])
        entry.path.write_bytes(broken)
        try:
            assert torch.equal(Store(tmp_path).read(entry.path.stem), wanted), at
        except ValueError as error:
            refused += 1
            assert f"{entry.path.name} is damaged" in str(error) and "delete it" in str(error)
    assert refused > 8
    entry.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        painted(tiny_sd, store=tmp_path)
    entry.path.unlink()
    painted(tiny_sd, store=tmp_path)


def test_a_picture_says_what_it_is(tiny_sd, tmp_path):
    painted(tiny_sd, store=tmp_path)
    facts = [entry.facts for entry in Store(tmp_path).entries()]
    assert [f["seed"] for f in facts] == [0, 1, 2] and {f["rows"] for f in facts} == {4}
    assert all(
        f["prompt"] == "a house by Van Gogh" and f["sampling"] == {"steps": 2} for f in facts
    )


def test_a_store_is_pruned_and_a_file_is_no_store(tiny_sd, tmp_path):
    painted(tiny_sd, store=tmp_path / "store")
    store = Store(tmp_path / "store")
    gone = store.prune(lambda entry: entry.facts["seed"] == 1, dry=True)
    assert len(gone) == 1 and len(list(store.entries())) == 3
    store.prune(lambda entry: entry.facts["seed"] == 1)
    assert [entry.facts["seed"] for entry in store.entries()] == [0, 2]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        Store(tmp_path / "file")


def test_a_temporary_store_is_gone_with_its_last_holder():
    store = Store.temporary()
    folder = store.folder
    assert folder.is_dir()
    del store
    assert not folder.exists()


KILLED = """
import sys, torch
import loco_core as loco
from loco_core.painting import Picture, Sampling, paint
loco.progress(False)
torch.set_num_threads(1)
pipe = loco.load(sys.argv[1], dtype=torch.float64)
listed = [Picture("a house by Van Gogh", seed) for seed in range(int(sys.argv[4]))]
print("ready", flush=True)
how = dict(store=sys.argv[2], batch_size=int(sys.argv[3]))
for pixels in paint(pipe, listed, Sampling(steps=2), **how):
    print("painted", flush=True)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    build_tiny_sd().save_pretrained(folder)
    return folder


def test_two_processes_and_one_that_is_killed_share_a_folder(saved, tmp_path):
    """Two writers at once, one of them killed again and again at another point: never a mixed
    picture."""
    pipe = loco.load(saved, dtype=torch.float64)  # in which no batch size moves a bit of a picture
    listed = [Picture("a house by Van Gogh", seed) for seed in range(60)]
    wanted = painted(pipe, listed)
    program = [sys.executable, "-c", KILLED, str(saved), str(tmp_path / "store")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    steady = subprocess.Popen([*program, "3", "60"], stdout=subprocess.DEVNULL, env=env)
    for pause in (0.0, 0.05, 0.2):
        victim = subprocess.Popen([*program, "4", "60"], stdout=subprocess.PIPE, env=env, text=True)
        assert victim.stdout.readline() == "ready\n"
        time.sleep(pause)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert steady.wait() == 0
    assert torch.equal(painted(pipe, listed, tmp_path / "store"), wanted)
    assert len(list(Store(tmp_path / "store").entries())) == 60


@pytest.mark.slow
def test_killed_at_thirty_random_moments_and_resumed_in_other_batches(saved, tmp_path):
    """No picture that was there is painted again, and none is wrong."""
    pipe, store, count = loco.load(saved, dtype=torch.float64), tmp_path / "store", 900
    moments, env = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1"}
    known: dict[str, tuple[int, int]] = {}
    sizes = []
    for kill in range(30):
        program = [sys.executable, "-c", KILLED, str(saved), str(store), str(1 + kill % 5)]
        victim = subprocess.Popen(
            [*program, str(count)], stdout=subprocess.PIPE, env=env, text=True
        )
        assert victim.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 1.5))
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        now = {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in store.rglob("*.png")}
        assert all(now[path] == stamp for path, stamp in known.items())
        known = now
        sizes.append(len(known))
    assert 10 < len(set(sizes)) and 0 < sizes[-1] < count  # killed while it painted
    wanted = painted(pipe, [Picture("a house by Van Gogh", seed) for seed in range(count)])
    listed = [Picture("a house by Van Gogh", seed) for seed in range(count)]
    assert torch.equal(painted(pipe, listed, store, batch_size=7), wanted)
    assert all((p.stat().st_mtime_ns, p.stat().st_ino) == known[str(p)]
               for p in store.rglob("*.png") if str(p) in known)  # fmt: skip
    assert len(list(Store(store).entries())) == count


# --- other processes


def test_another_process_paints_the_same_bytes(saved, tmp_path, monkeypatch):
    pipe = loco.load(saved)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    edit = loco.locoedit(pipe, STYLE, layers=[8, 9], lam=0.1)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, edit.applied(pipe):
        far = painted(pipe, store=tmp_path, map=pool.map, batch_size=2)
        seen = counted(monkeypatch)
        assert torch.equal(painted(pipe, store=tmp_path), far) and not seen
        assert torch.equal(painted(pipe, batch_size=2), far)


def test_a_pipeline_that_another_process_cannot_load_is_refused(tiny_sd, saved, tmp_path):
    with pytest.raises(ValueError, match="was not made by loco.load.*save_pretrained"):
        painted(tiny_sd, store=tmp_path, map=lambda function, items: map(function, items))
    changed = loco.load(saved)
    reversed_rows(changed)
    with pytest.raises(ValueError, match="differs in weights.*save_pretrained"):
        painted(changed, store=tmp_path, map=lambda function, items: map(function, items))


def test_an_order_and_a_picture_are_small_values(tiny_sd):
    picture = Picture("a", 3, ((1, "b"),), None, None, ("mid_block.resnets.0",))
    assert pickle.loads(pickle.dumps(picture)) == picture and len(pickle.dumps(picture)) < 400
    assert picture.to_json() == {
        "prompt": "a", "seed": 3, "reads": ((1, "b"),), "restored": ("mid_block.resnets.0",)
    }  # fmt: skip


# --- lazy pictures


def test_images_read_only_what_is_asked_for():
    pixels = torch.randint(256, (4, 2, 3, 3, 5, 6), dtype=torch.uint8)
    whole, read = pixels.float() / 255, []

    class Watched(Held):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    images = Images(Watched(pixels))
    assert images.shape == whole.shape and len(images) == 4 and not read
    assert torch.equal(images[1, 0, 2], whole[1, 0, 2]) and len(read) == 1
    for index in ((slice(None), 1), (2,), (slice(1, 3), slice(None), 0), ([0, 3],), (-1, -1)):
        assert torch.equal(images[index], whole[index]), index
    assert torch.equal(images[0, 1, 2, 0], whole[0, 1, 2, 0])
    assert torch.equal(images[:], whole) and torch.equal(torch.stack(list(images)), whole)
    assert torch.equal(images.rows(slice(2, None))[0], whole[2])


def test_the_state_of_a_model_is_told_quickly_and_by_name(tiny_sdxl):
    state = state_of(family_of(tiny_sdxl))
    assert state == state_of(family_of(build_tiny_sdxl()))
    assert state["scheduler"][0] == "EulerDiscreteScheduler" and not state["hooks"]
    assert set(state["tokenizers"]) == {"tokenizer", "tokenizer_2"}


def test_paint_batch_is_what_the_store_rounds(tiny_sd):
    exact = paint_batch(family_of(tiny_sd), PICTURES, FAST)
    assert torch.equal(exact.mul(255).round().to(torch.uint8), painted(tiny_sd))
