"""Explorers: what is clicked is what is painted, once; a Cancel leaves no trace."""

import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import build_tiny_sd, state

import loco_core as loco
from loco_core._progress import watched
from loco_core.display import any_of, edit_explorer, explore, one_of, routing_matrix
from loco_core.display.live import jobs
from loco_core.display.live.jobs import Cancelled, Job, take_turns_with_cells
from loco_core.display.live.results import Results
from loco_core.display.pixels import contact_sheet, eight_bit
from loco_core.display.widgets import data_uri
from loco_core.interventions.active import ours

PROMPTS = ["a house by van gogh", "a red cat"]
GOGH = loco.Concept("van gogh", "style", ["a house by van gogh"], ["a house"])
STEPS = 3


@pytest.fixture
def calls(tiny_sd):
    """Of the UNet, so far: a list with the thread of each."""
    seen = []
    note = ours(lambda *_: seen.append(threading.current_thread()))  # it only looks
    handle = tiny_sd.unet.register_forward_pre_hook(note)
    yield seen
    handle.remove()


def hooks(pipe) -> int:
    modules = [m for part in (pipe.unet, pipe.text_encoder, pipe.vae) for m in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def paint(pipe, prompt, routes=None, **settings):
    """[3, H, W] under one routing of `PROMPTS`."""
    if routes is not None:
        settings |= {"routes": [routes], "sources": PROMPTS}
    return loco.generate(pipe, [prompt], [0], STEPS, **settings)[0, 0]


def uri(*images) -> str:
    """The data URI of a contact sheet of pictures in one row, on the 8-bit grid."""
    return data_uri(contact_sheet(torch.stack(images)))


def matrix(pipe, start=None, **settings):
    explorer = routing_matrix(pipe, PROMPTS, start, **{"steps": STEPS, **settings})
    return explorer, explorer.live()


def edits(pipe, **settings):
    explorer = edit_explorer(
        pipe, GOGH, [6, 7], {"the style": PROMPTS[0], "another": PROMPTS[1]},
        {"twin": ["a house"], "others": ["a house by monet"]},
        **{"lam": [0.1, 10.0], "steps": STEPS, **settings},
    )  # fmt: skip
    return explorer, explorer.live()


# what is painted


def test_a_clicked_routing_is_painted_as_generate_paints_it(tiny_sd):
    _, box = matrix(tiny_sd)
    box.rows[3].value = 1
    box.window.value, box.prompt.value = (8, 10), 1
    box.put.click()
    box.paint.click()
    box.painter.wait()
    routes = [int(layer in (3, 8, 9, 10)) for layer in range(16)]
    routed = paint(tiny_sd, PROMPTS[0], routes)
    alone = [paint(tiny_sd, prompt) for prompt in PROMPTS]
    assert not torch.equal(eight_bit_tensor(routed), eight_bit_tensor(alone[0]))
    assert uri(*alone, routed) in box.painter.picture.value
    assert "layers 0 to 2 read A, 3 B, 4 to 7 A, 8 to 10 B, 11 to 15 A" in box.painter.picture.value


def eight_bit_tensor(image):
    return torch.from_numpy(eight_bit(image))


def test_a_routing_is_painted_for_every_seed_in_a_row_of_its_own(tiny_sd):
    explorer = routing_matrix(tiny_sd, PROMPTS, [1] * 16, seeds=[0, 5], steps=STEPS)
    images = loco.generate(tiny_sd, PROMPTS, [0, 5], STEPS)
    grid = torch.stack([images[0], images[1], images[1]], dim=1)
    assert data_uri(contact_sheet(grid, 3)) in explorer.to_html()
    assert "seed 5" in explorer.to_html()


def test_pooled_text_of_sdxl_has_a_row_of_its_own(tiny_sdxl):
    explorer = routing_matrix(tiny_sdxl, PROMPTS, steps=2)
    box = explorer.live()
    assert [row.description for row in box.rows[-2:]] == ["layer 17", "pooled text"]
    box.rows[-1].value = 1
    box.paint.click()
    box.painter.wait()
    settings = dict(routes=[[0] * 18], sources=PROMPTS)
    kept, swapped = (
        loco.generate(tiny_sdxl, PROMPTS[:1], [0], 2, pooled_routes=[k], **settings)[0, 0]
        for k in (0, 1)
    )
    alone = loco.generate(tiny_sdxl, PROMPTS, [0], 2)[:, 0]
    assert not torch.equal(kept, swapped)
    assert uri(*alone, swapped) in box.painter.picture.value


def test_an_edit_is_painted_before_and_after_at_the_chosen_lam_and_preserve(tiny_sd):
    _, box = edits(tiny_sd)
    twin, others = box.controls["preserve"].children[1:]
    box.controls["lam"].value = "10"
    twin.value = False
    box.painter.wait()
    edit = loco.locoedit(tiny_sd, GOGH, [6, 7], 10.0, preserve=["a house by monet"])
    before = loco.generate(tiny_sd, PROMPTS, [0], STEPS)[:, 0]
    with edit.applied(tiny_sd):
        after = loco.generate(tiny_sd, PROMPTS, [0], STEPS)[:, 0]
    assert not torch.equal(before, after)
    sheet = contact_sheet(torch.stack([before, after]), 2)
    assert data_uri(sheet) in box.painter.picture.value
    assert "lam: 10; preserve: others" in box.painter.picture.value


def test_explore_hands_its_function_the_value_of_a_slider_and_the_tuple_of_checkboxes():
    given = []

    def compute(k, words):
        given.append((k, words))
        return np.full((3, 4, 4), k / 100)

    choices = {"k": one_of([0, 50], start=50), "words": any_of({"a": "A", "b": "B"}, ["b"])}
    box = explore(compute, choices, "grey", stills=False).live()
    box.controls["words"].children[1].value = True
    box.painter.wait()
    box.controls["k"].value = "0"
    box.painter.wait()
    assert given == [(50, ("B",)), (50, ("A", "B")), (0, ("A", "B"))]
    assert data_uri(np.zeros((3, 4, 4))) in box.painter.picture.value
    assert 'alt="grey; k: 0; words: a, b"' in box.painter.picture.value


# painted once


def test_what_was_painted_is_not_painted_again(tiny_sd, calls):
    _, box = matrix(tiny_sd)
    box.rows[3].value = 1
    box.paint.click()
    box.painter.wait()
    done, first = len(calls), box.painter.picture.value
    box.rows[3].value = 0
    box.paint.click()
    box.painter.wait()
    box.rows[3].value = 1
    box.paint.click()
    box.painter.wait()
    assert len(calls) == done and box.painter.picture.value == first


def test_a_model_whose_weights_changed_is_painted_anew(tiny_sd, calls):
    explorer, box = matrix(tiny_sd)
    done, first = len(calls), box.painter.picture.value
    with loco.locoedit(tiny_sd, GOGH, range(16), lam=0.1).applied(tiny_sd):
        box.paint.click()
        box.painter.wait()
    assert len(calls) == done + 2 * STEPS  # each prompt alone; as routed is the first of them
    assert box.painter.picture.value != first


def test_the_static_twin_and_the_live_one_share_their_pictures(tiny_sd, calls):
    explorer = edit_explorer(
        tiny_sd, GOGH, [6, 7], {"the style": PROMPTS[0]}, {"twin": ["a house"]},
        lam=[0.1, 1.0, 10.0], steps=STEPS,
    )  # fmt: skip
    assert len(calls) == (1 + 3) * STEPS  # before, and after for every lam
    assert explorer.to_html().count("<img") == 3 and 'type="range"' in explorer.to_html()
    box = explorer.live()
    for lam in ("10", "1"):
        box.controls["lam"].value = lam
        box.painter.wait()
    assert len(calls) == (1 + 3) * STEPS


def test_results_in_a_folder_outlive_the_kernel(tiny_sd, calls, tmp_path):
    _, box = matrix(tiny_sd, folder=tmp_path)
    done = len(calls)
    _, again = matrix(tiny_sd, folder=tmp_path)
    assert len(calls) == done and again.painter.picture.value == box.painter.picture.value
    matrix(tiny_sd, folder=tmp_path, guidance=3.0)
    assert len(calls) > done


def test_a_damaged_result_and_a_folder_without_inputs_are_refused(tmp_path):
    pipe = build_tiny_sd()
    results = Results(lambda: np.zeros((3, 4, 4)), pipe, inputs={"x": 1}, folder=tmp_path)
    results({})
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    fresh = Results(lambda: np.zeros((3, 4, 4)), pipe, inputs={"x": 1}, folder=tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        fresh({})
    with pytest.raises(ValueError, match="a folder outlives this notebook"):
        Results(lambda: 0, pipe, folder=tmp_path)


def test_only_the_results_used_last_are_kept():
    made = []
    results = Results(lambda k: made.append(k) or np.full((3, 2, 2), k / 9), size=2)
    for k in (1, 2, 1, 3, 1, 2):
        assert results({"k": k}, k=k).images[0, 0, 0, 0, 0] == pytest.approx(k / 9, abs=1 / 255)
    assert made == [1, 2, 3, 2]


# cancelled


@pytest.mark.parametrize("kind", [matrix, edits], ids=["routing", "edit"])
def test_cancel_stops_before_the_next_step_and_leaves_no_trace(kind):
    pipe = build_tiny_sd()
    _, box = kind(pipe, steps=STEPS)
    weights, scheduler, count = state(pipe), pipe.scheduler, hooks(pipe)
    shown, seen = box.painter.picture.value, []

    def third(*_):
        seen.append(hooks(pipe))
        if len(seen) == 2:
            changed.append(state(pipe) != weights)
            box.painter.button.click()

    changed = []
    handle = pipe.unet.register_forward_pre_hook(third)
    if kind is matrix:
        box.rows[3].value = 1
        box.paint.click()
    else:
        box.controls["preserve"].children[1].value = False
    box.painter.wait()
    handle.remove()
    assert len(seen) == 2 < STEPS  # the step it was in was finished, no other begun
    assert changed == [kind is edits] and (kind is edits or seen[0] > count + 1)
    assert state(pipe) == weights and hooks(pipe) == count and pipe.scheduler is scheduler
    assert "cancelled" in box.painter.status.value and box.painter.picture.value == shown
    assert box.painter.button.disabled


def test_after_a_cancel_the_same_picture_can_be_painted(tiny_sd, calls):
    _, box = matrix(tiny_sd)
    handle = tiny_sd.unet.register_forward_pre_hook(lambda *_: box.painter.cancel())
    box.rows[0].value = 1
    box.paint.click()
    box.painter.wait()
    handle.remove()
    box.paint.click()
    box.painter.wait()
    routed = paint(tiny_sd, PROMPTS[0], [1] + [0] * 15)
    assert uri(*(paint(tiny_sd, p) for p in PROMPTS), routed) in box.painter.picture.value


def test_the_newest_request_is_the_one_that_is_shown(tiny_sd):
    _, box = edits(tiny_sd)
    started, go_on = threading.Event(), threading.Event()

    def hold(*_):
        started.set()
        go_on.wait(60)

    handle = tiny_sd.unet.register_forward_pre_hook(hold)
    box.controls["preserve"].children[1].value = False
    first = box.painter.job
    assert started.wait(60)
    box.controls["preserve"].children[2].value = False
    go_on.set()
    box.painter.wait()
    first.join()
    handle.remove()
    assert first.cancelled.is_set()
    assert "preserve: nothing" in box.painter.picture.value


@pytest.mark.parametrize(
    "work",
    [
        lambda pipe: loco.generate(pipe, PROMPTS, steps=STEPS, batch_size=1),
        lambda pipe: loco.localize(pipe, GOGH, seeds=[0], steps=STEPS, score=mean),
        lambda pipe: loco.trace(pipe, GOGH, seeds=[0], steps=STEPS, score=mean),
        lambda pipe: loco.trace(pipe, GOGH, "text_encoder", [0], steps=STEPS, score=mean),
    ],
    ids=["generate", "localize", "trace-unet", "trace-text"],
)
def test_all_long_work_stops_where_its_listener_says_and_leaves_no_trace(work):
    pipe = build_tiny_sd()
    weights, count, scheduler, told = state(pipe), hooks(pipe), pipe.scheduler, []

    def listen(what, done, total):
        told.append((what, done, total))
        if len(told) == 2:
            raise Cancelled

    with pytest.raises(Cancelled), watched(listen):
        work(pipe)
    assert len(told) == 2 and all(done <= total for _, done, total in told)
    assert state(pipe) == weights and hooks(pipe) == count and pipe.scheduler is scheduler
    loco.generate(pipe, PROMPTS[:1], steps=1)
    assert len(told) == 2  # and nobody listens any more


def mean(images, prompts):
    return images.flatten(1).mean(1)


# said


def test_warnings_and_errors_of_the_work_are_shown_beside_the_picture():
    def compute(k):
        if k == 1:
            warnings.warn("a large <edit>", stacklevel=1)
        if k == 2:
            raise ValueError("no such layer")
        return np.zeros((3, 4, 4))

    box = explore(compute, {"k": [0, 1, 2]}, "black", stills=False).live()
    said = []
    for k in "1012":
        box.controls["k"].value = k
        box.painter.wait()
        said.append(box.painter.picture.value)
    assert "a large &lt;edit&gt;" in said[0] and said[2] == said[0]
    assert "large" not in said[1] and said[3] == said[2]
    assert "ValueError: no such layer" in box.painter.status.value


def test_a_warning_stands_under_the_still_it_belongs_to_and_under_no_other():
    def compute(k):
        if k == 1:
            warnings.warn("k is large", stacklevel=1)
        return np.zeros((3, 4, 4))

    html = explore(compute, {"k": [0, 1]}, "black").to_html()
    assert 'data-label="k: 0"' in html and 'data-label="k: 1 - k is large"' in html


def test_progress_is_told_step_by_step(tiny_sd):
    _, box = matrix(tiny_sd)
    told = []
    box.painter.status.observe(lambda change: told.append(change.new), "value")
    box.rows[0].value = 1
    box.paint.click()
    box.painter.wait()
    assert any(f"step {STEPS} of {STEPS}" in text for text in told)
    assert box.painter.status.value == '<span role="status"></span>'


# taking turns


def test_a_job_and_a_cell_wait_for_each_other():
    from IPython.core.interactiveshell import InteractiveShell

    shell, order, free = InteractiveShell.instance(), [], threading.Event()
    try:
        take_turns_with_cells()
        shell.user_ns |= {"order": order, "Job": Job}
        running = threading.Event()

        def work():
            running.set()
            free.wait(60)
            order.append("job")

        job = Job(work, print, lambda *_: None)
        job.start()
        running.wait(60)
        threading.Timer(0.2, free.set).start()
        shell.run_cell("order.append('cell')")
        assert order == ["job", "cell"]
        shell.run_cell(
            "import time; late = Job(lambda: order.append('late'), print, lambda *_: None)\n"
            "late.start(); time.sleep(0.2); order.append('cell again')"
        )
        shell.user_ns["late"].join()
        assert order[2:] == ["cell again", "late"]
    finally:
        InteractiveShell.clear_instance()


@pytest.fixture
def shell():
    from IPython.core.interactiveshell import InteractiveShell

    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_a_cell_that_waits_for_a_picture_gets_it_and_has_its_turn_again(shell):
    take_turns_with_cells()
    box = explore(lambda k: np.full((3, 4, 4), k / 9), {"k": [1, 2]}, "grey", stills=False).live()
    shell.user_ns |= {"box": box, "seen": (seen := []), "Job": Job}
    shell.run_cell("pass")  # cells take turns from the next one on
    cell = (
        "box.controls['k'].value = '2'; box.painter.wait()\n"
        "seen.append(box.painter.picture.value)\n"
        "late = Job(lambda: seen.append('late'), print, lambda *_: None); late.start()\n"
        "import time; time.sleep(0.2); seen.append('cell')"
    )
    thread = threading.Thread(target=shell.run_cell, args=[cell], daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    shell.user_ns["late"].join(60)
    assert 'alt="grey; k: 2"' in seen[0] and seen[1:] == ["cell", "late"]


def test_a_wait_that_is_interrupted_does_not_wait_for_the_job():
    free, began = threading.Event(), threading.Event()

    def work():
        began.set()
        free.wait(60)

    class Interrupted(Job):
        def join(self, timeout=None):
            began.wait(60)
            raise KeyboardInterrupt

    job, ended = Interrupted(work, print, lambda *_: None), []

    def cell():
        jobs._cell_starts()
        job.start()
        with pytest.raises(KeyboardInterrupt):
            jobs.wait_for(job)
        jobs._cell_ends()
        ended.append(job.is_alive())

    thread = threading.Thread(target=cell, daemon=True)
    thread.start()
    thread.join(60)
    free.set()
    threading.Thread.join(job, 60)
    assert ended == [True]  # it ended while the job still ran
    assert jobs._turn.acquire(timeout=60)  # and nobody holds the turn
    jobs._turn.release()


def test_a_job_that_waits_for_its_turn_can_be_cancelled():
    free, ended = threading.Event(), []
    first = Job(lambda: free.wait(60), print, lambda *_: None)
    second = Job(lambda: ended.append("worked"), print, lambda result, error: ended.append(error))
    first.start()
    second.start()
    second.cancel()
    second.join(60)
    free.set()
    first.join(60)
    (error,) = ended
    assert isinstance(error, Cancelled)


# static


def test_without_a_kernel_an_explorer_is_html_with_alt_text_and_its_matrix(tiny_sd):
    explorer = routing_matrix(tiny_sd, PROMPTS, [0] * 8 + [1] * 8, steps=1)
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    html = bundle["text/html"]
    assert (
        'alt="pictures of each prompt alone, and as routed: layers 0 to 7 read A, 8 to 15 B"'
        in html
    )
    assert html.count("●") == 16 and html.count("·") == 16 and "a red cat" in html


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: explore(np.zeros, {}, "x"), "no choices"),
        (lambda: explore(np.zeros, {"k": []}, "x"), "needs options"),
        (lambda: one_of([1, 2], start=3), "start 3 is no option; choose from 1, 2"),
        (lambda: any_of({"a": 1}, ["b"]), "start 'b' is no option; choose from a"),
        (lambda: one_of([1, 1]), "labels that differ"),
        (lambda: explore(lambda k: np.zeros((4, 4)), {"k": [1]}, "x"), r"got \(4, 4\)"),
        (lambda: explore(lambda k: np.full((3, 4, 4), np.nan), {"k": [1]}, "x"), "NaN"),
        (
            lambda: explore(lambda k: np.zeros((3, 4, 4)), {"k": [1]}, "x", rows=["a", "b"]),
            "2 rows labels for 1 rows",
        ),
    ],
    ids=["choices", "options", "start", "many", "twice", "shape", "nan", "rows"],
)
def test_explore_refuses_what_it_cannot_show(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_routing_that_does_not_fit_the_model_is_refused(tiny_sd):
    with pytest.raises(ValueError, match="16 layers"):
        routing_matrix(tiny_sd, PROMPTS, [0] * 15)
    with pytest.raises(ValueError, match="texts 0 to 1"):
        routing_matrix(tiny_sd, PROMPTS, [2] * 16)
