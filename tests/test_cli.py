"""The command line: every example of its help does what it says, and every refusal is one line."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy
import pytest
import torch
import yaml
from conftest import build_tiny_sd
from PIL import Image
from typer.main import get_command

import loco_core as loco
from loco_core import cli
from loco_core.cli import read, report
from loco_core.files import MARK, claimed
from loco_core.judging.probes import Probe
from loco_core.painting import Store

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = get_command(cli.app).commands
STORY = [  # later ones use the results of earlier ones
    "models", "layers", "localize", "edit", "generate", "evaluate", "lora", "trace", "neurons",
    "attribute", "compose", "store",
]  # fmt: skip
FILES = {
    "localize": ("localization.safetensors", "scores.png", "images.png"),
    "edit": ("edit.safetensors",),
    "generate": ("images.png", *(f"images/000-seed-{seed}.png" for seed in range(4))),
    "evaluate": ("evaluation.safetensors", "images.png"),
    "lora": ("lora.safetensors",),
    "trace": ("causal_trace.safetensors", "effects.png"),
    "neurons": ("neurons.safetensors", "images.png"),
    "attribute": ("edit.safetensors",),
    "compose": ("edit.safetensors",),
}
PROMPT = "a blue boat in the style of Mira Holt"
PROBES = [
    Probe(PROMPT, "efficacy", "style", "Mira Holt", wanted=False),
    Probe(PROMPT, "specificity: same image", "object", "boat"),
]


def example(name: str) -> str:
    """The last lines of a command's help, as typed by a user."""
    context = COMMANDS[name].make_context(name, [], resilient_parsing=True)
    _, found = COMMANDS[name].get_help(context).split("Example:\n")
    return found.strip()


def commands_of(path: Path) -> list[str]:
    """The lines of a text that are commands of ours."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if re.match(rf"loco ({'|'.join(COMMANDS)})\b", line)]


def arguments(line: str) -> list[str]:
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """An empty folder to work in, as a user does."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def ran(home):
    """Name -> (exit code, standard output, standard error, arguments) of every example, with
    --json. The default probes of `evaluate` are many, so it is asked two. `store` looks at one."""
    (home / "probes.json").write_text(json.dumps(list(map(vars, PROBES))))
    Store("stars").write("0" * 64, torch.zeros(3, 8, 8, dtype=torch.uint8), model="mini-sd")
    found = {}
    for name in STORY:
        given = [*arguments(example(name)), "--json"]
        given += ["--probes", "probes.json"] if name == "evaluate" else []
        found[name] = (*run(given), given)
    return found


def run(given: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `loco` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(given)
    return code, out.getvalue(), err.getvalue()


def test_the_story_tells_every_command():
    assert set(STORY) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_in_one_example_that_can_be_copied(name):
    (line,) = example(name).splitlines()
    assert line.startswith(f"loco {name}")


@pytest.mark.parametrize("name", STORY)
def test_every_example_runs_and_prints_json_and_nothing_else(name, ran):
    code, out, err, _ = ran[name]
    assert code == 0, err
    assert json.loads(out) and "NaN" not in out
    assert "error" not in err


@pytest.mark.parametrize("name", FILES)
def test_every_result_folder_is_complete_and_says_how_it_was_made(name, ran, home):
    _, out, _, given = ran[name]
    folder = home / (given[3] if name == "lora" else given[given.index("--out") + 1])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {*FILES[name], "result.json", "manifest.json"}
    assert (folder / "result.json").read_text() == out
    manifest = json.loads((folder / "manifest.json").read_text())
    assert arguments(manifest["command"]) == given
    assert manifest["model"]["fingerprint"] == loco.records.provenance(pipe_of()).fingerprint
    assert set(manifest["model"]["versions"]) == {"loco_core", *loco.records.LIBRARIES}
    assert manifest["seconds"] > 0 and manifest["started"].endswith("+00:00")
    if "seeds" in manifest["settings"]:
        assert manifest["seeds"] == ([0, 1, 2, 3] if name == "generate" else [0])


@cache
def pipe_of():
    return loco.load("mini-sd")


def test_no_example_leaves_anything_beside_its_folder(ran, home):
    assert {path.name for path in home.iterdir()} == {
        "probes.json", "found", "gone", "pictures", "judged", "gone-lora", "traced", "neurons",
        "parts", "both", "stars",
    }  # fmt: skip


def test_localize_finds_the_planted_layers(ran, home):
    told = json.loads(ran["localize"][1])
    assert told["layers"] == told["planted"] == loco.shapeland.truth("mini-sd")["style"]
    assert told["verdict"] == "found" and told["p"] <= 0.05
    assert told["best window"] == told["layers"]
    assert loco.Localization.load(home / "found").layers == tuple(told["layers"])


def test_the_sheet_of_a_localization_is_read_from_its_pictures(ran, home):
    found = loco.Localization.load(home / "found")
    sheet = torch.from_numpy(numpy.array(Image.open(home / "found" / "images.png")))
    sheet = sheet.permute(2, 0, 1)
    assert sheet.shape == (3, 6 * 66 - 2, 17 * 66 - 2)
    columns = [found.baseline.images, *found.images, found.neutral.images]
    for number, images in enumerate(columns):
        for p in range(6):
            tile = sheet[:, p * 66 : p * 66 + 64, number * 66 : number * 66 + 64]
            assert torch.equal(tile, images[p, 0].mul(255).round().byte())


def test_too_few_pictures_are_undecided_and_name_no_layers(home):
    code, out, err = run(shlex.split(f"{LOCALIZE} object:star --json --out few"))
    told = json.loads(out)
    assert code == 0 and "cannot decide" in err
    assert (told["verdict"], told["layers"], len(told["best window"])) == ("undecided", [], 2)
    assert (home / "few" / "scores.png").is_file()


def test_tracing_is_a_method_of_localize(home):
    code, out, err = run(
        shlex.split(f"{LOCALIZE} object:star --method tracing --json --out restored")
    )
    told = json.loads(out)
    assert code == 0, err
    assert {"corrupted", "clean"} < set(told) and "nothing replaced" not in told
    settings = loco.Localization.load(home / "restored").provenance.settings
    assert settings["method"] == "tracing"


def test_the_methods_offered_are_those_of_the_library():
    offered, *_ = get_args(cli.find.localize.__annotations__["method"])
    assert get_args(offered) == tuple(loco.localization.METHODS)


def test_three_commands_take_the_style_out_of_the_pictures(ran, home):
    files = [home / "pictures" / name for name in FILES["generate"][1:]]
    edited = torch.stack([pixels(path) for path in files])
    before = loco.generate(pipe_of(), ["a red star by Mira Holt"], seeds=range(4), steps=8)[0]
    assert loco.shapeland.judge(before)["style"] == ["Mira Holt"] * 4
    seen = loco.shapeland.judge(edited)
    assert "Mira Holt" not in seen["style"] and seen["object"] == ["star"] * 4
    assert seen["color"] == ["red"] * 4


def pixels(path: Path) -> torch.Tensor:
    data = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8)
    return data.view(64, 64, 3).permute(2, 0, 1) / 255


def test_evaluate_tells_that_the_edit_takes_the_style_and_keeps_the_object(ran, home):
    rows = {row["edit"]: row for row in json.loads(ran["evaluate"][1])["summary"]}
    assert rows["no edit"]["efficacy"] == 0 and rows["edit"]["efficacy"] == 1
    assert rows["edit"]["specificity"] == 1
    assert loco.Evaluation.load(home / "judged").probes == tuple(PROBES)


def test_the_lora_folder_does_what_the_edit_does(ran, home):
    pipe = loco.load("mini-sd")
    with loco.Edit.load(home / "gone" / "edit.safetensors").applied(pipe):
        wanted = loco.generate(pipe, [PROMPT], steps=2)
    pipe.load_lora_weights(str(home / "gone-lora"))
    assert (loco.generate(pipe, [PROMPT], steps=2) - wanted).abs().max() < 1e-3


def test_a_knock_out_is_handed_on_as_a_lora_once_a_rank_is_named(ran, home):
    code, _, err = run(["lora", "mini-sd", "parts", "parts-lora"])
    assert code == 1 and "a LoRA adds a matrix of low rank" in err and "rank=32" in err
    code, out, err = run(["lora", "mini-sd", "parts", "parts-lora", "--rank", "8", "--json"])
    assert code == 0 and 0 < json.loads(out)["left out of the change"] < 1
    assert "leaves out" in err
    shutil.rmtree(home / "parts-lora")


def test_trace_finds_the_one_place_of_the_text_encoder_that_brings_the_object_back(ran):
    sites = json.loads(ran["trace"][1])["sites"]
    assert max(sites, key=lambda site: site["effect"])["site"].endswith("layers.0.self_attn")


def test_what_is_no_number_is_null_in_json(ran):
    assert json.loads(ran["trace"][1])["sites"][0]["low"] is None


def test_an_edit_of_single_weights_can_be_used_like_any_other(ran, home):
    edit = loco.Edit.load(home / "parts" / "edit.safetensors")
    zeroed = sum(len(change.indices) for change in edit.changes.values())
    assert json.loads(ran["attribute"][1])["zeroed"] == zeroed > 0
    given = ["generate", "mini-sd", "--edit", "parts", "--prompt", "a star", "--seeds", "0"]
    assert run([*given, "--steps", "1", "--out", "one"])[0] == 0


def test_two_edits_are_one_that_does_both(ran, home):
    both = loco.Edit.load(home / "both" / "edit.safetensors")
    gone, parts = (loco.Edit.load(home / n / "edit.safetensors") for n in ("gone", "parts"))
    assert both == loco.compose(gone, parts)
    given = shlex.split("compose mini-sd gone parts --scale 0.5 --out half --json")
    assert run(given)[0] == 0
    assert loco.Edit.load(home / "half" / "edit.safetensors") == both.scaled(0.5)
    code, _, err = run(shlex.split("compose mini-sd gone --out alone"))
    assert code == 2 and "two edits or more" in err and not (home / "alone").exists()


def test_what_an_edit_is_made_of_can_all_be_asked(ran, home):
    (home / "exact.txt").write_text("a tree\na house\n")
    asked = (
        'edit mini-sd --concept "style:Mira Holt" --layers 8,9 --lam-k 3 --lam-v 20 --where v '
        "--no-preserve-neutral "
        "--null-space exact.txt --scale 0.5 --out asked"
    )
    assert run(shlex.split(asked))[0] == 0
    concept = loco.shapeland.concept("style", "Mira Holt", 12)
    wanted = loco.locoedit(
        pipe_of(), concept, [8, 9], lam_k=3.0, lam_v=20.0, where=("v",),
        null_space=["a tree", "a house"],
    )  # fmt: skip
    assert loco.Edit.load(home / "asked" / "edit.safetensors") == wanted.scaled(0.5)
    layer = 'edit mini-sd --method quickfix --concept "style:Mira Holt" --layer 1 --out second'
    assert run(shlex.split(layer))[0] == 0
    assert all("layers.1." in n for n in loco.Edit.load("second/edit.safetensors").changes)


def test_the_defaults_of_attribute_take_the_object_where_the_published_setting_does_not(ran, home):
    """Also 3 % more of the weights in one round would not do: the book's chapter on it measures."""
    published = "attribute mini-sd --concept object:star --as-published --prompts 2 --steps 8"
    assert run(shlex.split(f"{published} --out published"))[0] == 0
    made = {n: loco.Edit.load(home / n / "edit.safetensors") for n in ("parts", "published")}
    settings = made["parts"].provenance.settings
    wanted = dict(rounds=2, quota="matrix", against="neutral", ratio=0.03, text_layers=[6, 7])
    assert {name: settings[name] for name in wanted} == wanted
    settings = made["published"].provenance.settings
    wanted = dict(quota="row", against="empty", ratio=1e-3, measure="epsilon", text_layers=None)
    assert {name: settings[name] for name in wanted} == wanted and "rounds" not in settings
    left = {}
    for name, edit in made.items():
        with edit.applied(pipe_of()):
            images = loco.generate(pipe_of(), ["a red star", "a blue star"], seeds=[0, 1], steps=8)
        left[name] = loco.shapeland.judge(images.flatten(0, 1))["object"].count("star")
    assert left["parts"] == 0 and left["published"] >= 3


def test_controls_and_fidelity_of_an_attribution_can_be_asked(home):
    given = "attribute mini-sd --concept object:star --layers 6 --prompts 1 --steps 2 --quota all"
    asked = f"{given} --by random --control-seed 3 --fidelity 4 --keep --out chance --json"
    code, out, err = run(shlex.split(asked))
    assert code == 0, err
    told = json.loads(out)
    assert -1 <= told["fidelity low"] <= told["fidelity r"] <= told["fidelity high"] <= 1
    made = loco.Edit.load(home / "chance" / "edit.safetensors").provenance.settings
    assert (made["by"], made["seed"], made["quota"]) == ("random", 3, "all")
    assert len(loco.Attribution.load(home / "chance")) == told["scored"]
    code, _, err = run(shlex.split(f"{given} --objective amplify --rounds 2 --out new"))
    assert code == 2 and "--rounds is for --objective erase" in err


def test_neurons_are_ranked_as_recommended_or_as_published(home):
    concept = loco.shapeland.concept("style", "Mira Holt", 4)
    given = 'neurons mini-sd --concept "style:Mira Holt" --layers 8,9 --prompts 4 --steps 1 --top 5'
    for more, where, token, by in (
        ("", ("v",), "padding", "shift"),
        ("--as-published", ("k", "v"), "last", "z"),
        ("--as-published --token eos --where k", ("k",), "eos", "z"),
    ):
        assert run(shlex.split(f"{given} {more} --force --out ranked"))[0] == 0
        wanted = loco.rank_neurons(pipe_of(), concept, [8, 9], where, token, by=by)
        assert torch.equal(loco.Neurons.load(home / "ranked").order, wanted.order)


def test_an_edit_is_made_as_recommended_or_as_published(home):
    given = 'edit mini-sd --concept "style:Mira Holt" --layers 8,9 --prompts 3 --force --out'
    concept = loco.shapeland.concept("style", "Mira Holt", 3)
    assert run(shlex.split(f"{given} ours"))[0] == 0
    ours = loco.Edit.load(home / "ours" / "edit.safetensors").provenance.settings
    model = loco.family_of(pipe_of())
    texts, rows = model.encode(concept.prompts), []
    for i, prompt in enumerate(concept.prompts):
        end = (texts.tokens[i] == pipe_of().tokenizer.eos_token_id).nonzero()[0].item()
        rows += [texts.embeds[i, t] for t in (model.subject_span(prompt, concept.name)[1], end)]
    tenth = torch.stack(rows).double().square().sum(1).mean().item() / 10
    assert ours["lam"]["k"] == ours["lam"]["v"] == pytest.approx(tenth, rel=5e-3)
    assert ours["preserve"] == list(concept.neutral) and ours["tokens"] == "eos"
    assert run(shlex.split(f"{given} theirs --as-published"))[0] == 0
    theirs = loco.Edit.load(home / "theirs" / "edit.safetensors")
    assert theirs == loco.locoedit(pipe_of(), concept, [8, 9], 0.01, tokens="last")
    assert run(shlex.split(f"{given} plain --lam 3 --no-preserve-neutral"))[0] == 0
    plain = loco.Edit.load(home / "plain" / "edit.safetensors")
    assert plain == loco.locoedit(pipe_of(), concept, [8, 9], 3.0)


def test_an_edit_is_compared_with_the_rivals_that_are_named(home):
    (home / "one.json").write_text(json.dumps([vars(PROBES[0])]))
    given = 'edit mini-sd --concept "style:Mira Holt" --layers 8,9 --force --out rivalled'
    assert run(shlex.split(given))[0] == 0
    asked = "evaluate mini-sd rivalled --probes one.json --seeds 0 --steps 1 --rival destroyer "
    code, out, err = run(shlex.split(f"{asked} --rival noise --json --out compared"))
    assert code == 0, err
    named = [row["edit"] for row in json.loads(out)["summary"]]
    assert named == ["no edit", "edit", "destroyer", "noise"]
    code, _, err = run(shlex.split(f"{asked} --rival best --out new"))
    assert code == 1 and "no rival is called 'best'" in err


def test_pictures_in_files_are_what_amplifies(ran, home):
    given = ["attribute", "mini-sd", "--concept", "object:star", "--objective", "amplify"]
    given += ["--prompts", "2", "--steps", "4"]
    file = "pictures/images/000-seed-0.png"
    assert run([*given, "--image", file, "--image", file, "--out", "louder"])[0] == 0
    made = loco.Edit.load(home / "louder" / "edit.safetensors").provenance.settings
    assert (made["method"], made["images"]) == ("cad amplify", True)
    code, _, err = run([*given, "--image", file, "--image", "found/images.png", "--out", "new"])
    assert code == 1 and "not of one size" in err


def test_a_reader_gets_a_short_table():
    code, out, _ = run(["models"])
    header, *rows = out.splitlines()
    assert code == 0 and header.split() == ["model", "MB", "planted"]
    assert [row.split()[0] for row in rows] == list(loco.zoo.minis())
    _, out, _ = run(["layers", "mini-sd"])
    assert len(out.splitlines()) == 1 + len(loco.text_layers(pipe_of()))


@pytest.mark.parametrize("path", ["README.md", "book/command_line.md"])
def test_every_command_in_the_text_is_an_example_or_at_least_parses(path):
    lines = commands_of(ROOT / path)
    assert len(lines) >= 3
    for line in set(lines) - {example(name) for name in COMMANDS}:
        name, *given = arguments(line)
        COMMANDS[name].make_context(name, given)


def test_the_readme_tells_the_story_by_commands_that_run_here():
    examples = [example(name) for name in STORY]
    places = [examples.index(line) for line in commands_of(ROOT / "README.md")]
    assert places == sorted(places) and len(places) >= 4


@pytest.fixture(scope="module")
def undecided(ran, home):
    """The localization, as if no window had done anything."""
    found = loco.Localization.load(home / "found")
    same = found.reference.expand_as(found.scored).contiguous()
    replace(found, scored=same).save(home / "nothing-found")


@pytest.fixture(scope="module")
def damaged(ran, home):
    """A copy of the edit with one bit changed."""
    data = bytearray((home / "gone" / "edit.safetensors").read_bytes())
    data[-5] ^= 1
    (home / "damaged.safetensors").write_bytes(data)


LOCALIZE = "localize mini-sd --steps 1 --seeds 0 --prompts 1 --out new --concept"
GENERATE = 'generate mini-sd --prompt "a star" --steps 1 --seeds 0'
ATTRIBUTE = "attribute mini-sd --concept object:star --layers 6 --prompts 1 --steps 2 --out new"


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("layers nothing-here", 1, "model 'nothing-here' is unknown: pass a mini"),
        (f"{LOCALIZE} style:Nobody", 1, "unknown style 'Nobody'; choose from Mira Holt"),
        (f"{LOCALIZE} smell:roses", 1, "unknown attribute 'smell'; choose from style"),
        (f"{LOCALIZE} roses", 1, "neither a file nor KIND:NAME"),
        ("edit mini-sd --concept object:star --layers 7-16 --out new", 1, "layers [16] must be"),
        (f"{GENERATE} --out gone", 1, "gone has a result already: name another folder"),
        (f"{GENERATE} --out kept --force", 1, "kept is not empty and no result of loco"),
        (f"{GENERATE} --out probes.json", 1, "probes.json is a file"),
        (f"{GENERATE} --out new --edit damaged.safetensors", 1, "contents do not match"),
        (f"{GENERATE} --out new --edit found", 1, "no edit is saved at found"),
        ("lora mini-sd-natural gone new", 1, "was made for other weights than those"),
        ("edit mini-sd-natural --window-from found --out new", 1, "found was found on mini-sd"),
        ("evaluate mini-sd gone --concept object:star --out new", 1, "is no edit of 'star'"),
        (f"{GENERATE} --out new --steps 0", 1, "steps 0 is not a whole number"),
        (f"{GENERATE} --out new --device nowhere", 1, "nowhere"),
        (f"{GENERATE} --out new --engine nowhere", 1, "engine 'nowhere' is no file and no word"),
        (f"{GENERATE} --out new --seeds 0,0", 1, "seeds [0] are given twice"),
        ("layers mini-sd --revision main", 1, "revision 'main' is for Hub ids"),
        ("edit mini-sd --window-from nothing-found --out new", 1, "name them yourself"),
        ("edit mini-sd --window-from nothing-found --out new", 1, "best window is --layers 0,1"),
        ("neurons mini-sd --window-from nothing-found --out new", 1, "(verdict 'none', p = 1)"),
        ("store no-such-folder", 1, "no-such-folder does not exist"),
        ("store kept", 1, "kept is no store of pictures"),
        ("store kept --prune --older-than 0", 1, "kept is no store of pictures"),
        ("store gone", 1, "gone is no store of pictures"),
        ("store stars --prune", 2, "--prune needs --model or --older-than"),
        ("store stars --prune --dry-run", 2, "--prune needs --model or --older-than"),
        ("store stars --model mini-sd", 2, "say what to --prune"),
        ("store stars --dry-run", 2, "say what to --prune"),
        (f"{GENERATE} --out new --height 64", 2, "--height and --width go together"),
        (f"{LOCALIZE} object:star --width 64", 2, "--height and --width go together"),
        (f"{GENERATE} --out new --batch-size 0", 2, "neither a number of images from 1 on nor"),
        (f"{GENERATE} --out new --batch-size all", 2, "'all' is neither a number of images"),
        (f"{LOCALIZE} object:star --method tracing --neutral twin", 2, "--neutral is not for"),
        (f"{LOCALIZE} object:star --draws 2", 2, "--draws is not for --method locogen"),
        (f"{GENERATE}", 2, "Missing option '--out'"),
        (f"{GENERATE} --out new --seeds 0-x", 2, "'0-x' is not numbers and ranges"),
        (f"{GENERATE} --out new --seeds 3-1", 2, "'3-1' is not numbers and ranges"),
        (f"{GENERATE} --out new --speed 9", 2, "No such option: --speed"),
        ("paint mini-sd", 2, "No such command 'paint'"),
        (f"{LOCALIZE} object:star --window wide", 2, "neither a number of layers nor"),
        ("edit mini-sd --window-from found --layers 8 --out new", 2, "give one of them"),
        ("edit mini-sd --layers 8 --out new", 2, "name a --concept"),
        ("edit mini-sd --concept object:star --out new", 2, "needs --layers or --window-from"),
        (
            "edit mini-sd --concept object:star --method quickfix --lam-k 3 --out new",
            2,
            "--lam-k is not for --method quickfix",
        ),
        (
            "edit mini-sd --concept object:star --method uce --layers 8 --as-published --out new",
            2,
            "--as-published: uce is as published already",
        ),
        (f"{ATTRIBUTE} --ratio 0", 2, "--ratio 0.0 is not in (0, 1]"),
        (f"{ATTRIBUTE} --rounds 0", 2, "--rounds 0: choose a whole number"),
        (f"{ATTRIBUTE} --objective amplify --rounds 2", 2, "--rounds is for --objective erase"),
        (f"{ATTRIBUTE} --by random --rounds 2", 2, "--by random has no rounds"),
        (f"{ATTRIBUTE} --fidelity 2", 2, "a correlation needs 4 knock-outs or more"),
        ("evaluate mini-sd gone --height 32 --width 32 --out new", 1, "64 x 64 pixels, not of 32"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    line, code, reason, ran, home, damaged, undecided
):
    (home / "kept" / "ab").mkdir(exist_ok=True, parents=True)
    (home / "kept" / "ab" / "cat.png").write_bytes(b"mine")
    (home / "kept" / "diary.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    found, out, err = run(shlex.split(line))
    assert (found, out) == (code, "")
    (told,) = err.splitlines()
    assert told.startswith("error: ") and reason in told
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_debug_shows_where_an_error_arose():
    code, _, err = run(["layers", "nothing-here", "--debug"])
    assert code == 1 and "Traceback" in err and err.splitlines()[-1].startswith("error: model")


def test_force_replaces_a_result_and_nothing_else(tmp_path):
    given = ["edit", "mini-sd", "--concept", "object:star", "--out", str(tmp_path / "edit")]
    assert run([*given, "--layers", "6"])[0] == 0
    (tmp_path / "edit" / "left over").touch()
    assert run([*given, "--layers", "7", "--force"])[0] == 0
    names = {path.name for path in (tmp_path / "edit").iterdir()}
    assert names == {"edit.safetensors", "result.json", "manifest.json"}
    assert "[7]" in repr(loco.Edit.load(tmp_path / "edit" / "edit.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_ctrl_c_ends_with_130_and_leaves_only_whole_batches_to_resume_from(tmp_path):
    given = [*shlex.split(GENERATE), "--seeds", "0-23", "--batch-size", "1"]
    given += ["--out", str(tmp_path / "out")]
    code = "import sys; from loco_core.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    parts = tmp_path / "out.parts"
    while len(list(parts.glob("??/*.png"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, b""), err.decode()
    assert err.decode().splitlines()[-1] == "error: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["out.parts"]
    finished = [entry.path.stem for entry in Store(parts).entries()]
    assert 2 <= len(finished) < 24

    assert run(given)[0] == 1  # not unless told how to go on
    first = next(entry for entry in Store(parts).entries() if entry.facts["seed"] == 0)
    blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
    Store(parts).write(first.path.stem, blank, rows=1)  # what is there is not made again
    assert run([*given, "--resume", "--batch-size", "5"])[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = [pixels(tmp_path / "out" / "images" / f"000-seed-{seed}.png") for seed in range(24)]
    wanted = loco.generate(pipe_of(), ["a star"], range(24), steps=1)[0]
    assert not made[0].any()
    # batches of another size round otherwise: by one grey level, in few of the bytes
    levels = (torch.stack(made[1:]) - wanted[1:]).mul(255).round().abs()
    assert levels.max() <= 1 and levels.mean() < 1e-3


def test_a_sweep_that_failed_goes_on_from_its_pictures(tmp_path, monkeypatch):
    given = [*shlex.split(f"{LOCALIZE} object:star"), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(loco.display, "score_curve", lambda *_, **__: 1 / 0)
        code, _, err = run([*given, "--batch-size", "3"])
    assert code == 1 and "--resume" in err
    before = {entry.path.name for entry in Store(tmp_path / "out.parts").entries()}
    assert len(before) == 17

    def painted_again(*_, **__):
        raise AssertionError("a picture was painted twice")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", painted_again)
        assert run([*given, "--resume"])[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_pictures_have_the_size_that_is_asked_for(tmp_path):
    given = [
        *shlex.split(GENERATE),
        "--height",
        "32",
        "--width",
        "64",
        "--out",
        str(tmp_path / "a"),
    ]
    assert run(given)[0] == 0
    assert Image.open(tmp_path / "a" / "images" / "000-seed-0.png").size == (64, 32)
    assert Image.open(tmp_path / "a" / "images.png").size == (64, 32)
    given = [*shlex.split(LOCALIZE), "object:star", "--height", "32", "--width", "64", "--out"]
    assert run([*given, str(tmp_path / "b")])[0] == 0
    assert loco.Localization.load(tmp_path / "b").images.shape[-2:] == (32, 64)


def test_an_engine_paints_the_same_pictures(tmp_path):
    pytest.importorskip("distributed")
    given = [*shlex.split(GENERATE), "--seeds", "0-3", "--batch-size", "2", "--out"]
    assert run([*given, str(tmp_path / "here")])[0] == 0
    assert run([*given, str(tmp_path / "there"), "--engine", "local:1"])[0] == 0
    names = [f"images/000-seed-{seed}.png" for seed in range(4)]
    here, there = (
        [pixels(tmp_path / where / name) for name in names] for where in ("here", "there")
    )
    assert torch.equal(torch.stack(here), torch.stack(there))
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("models", "store")])
def test_every_command_with_a_model_takes_a_variant_and_a_revision(name):
    assert {"variant", "revision", "device", "dtype"} < {x.name for x in COMMANDS[name].params}


PAINTS = {"generate", "localize", "trace", "evaluate", "neurons"}


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_paints_takes_an_engine_and_can_be_resumed(name):
    options = {x.name: x for x in COMMANDS[name].params}
    assert ({"engine", "resume", "batch_size"} <= set(options)) == (name in PAINTS)
    assert ({"height", "width"} <= set(options)) == (name in PAINTS)
    if name in PAINTS:
        assert options["batch_size"].default == "fit"


def test_a_variant_is_loaded(tmp_path):
    build_tiny_sd().save_pretrained(tmp_path / "half", variant="fp16")
    code, _, err = run(["layers", str(tmp_path / "half")])
    assert code == 1 and "variant" in err
    assert run(["layers", str(tmp_path / "half"), "--variant", "fp16"])[0] == 0


DAY = 24 * 3600
MINE = {"a": ("mini-sd", 40), "b": ("mini-sd", 1), "c": ("mini-sdxl", 40), "d": ("mini-sdxl", 1)}


@pytest.fixture
def store(tmp_path):
    """Four pictures of two models, two of each written 40 days ago, and a file that is not ours."""
    kept = Store(tmp_path / "store")
    for name, (model, days) in MINE.items():
        blank = torch.zeros(3, 8, 8, dtype=torch.uint8)
        kept.write(name * 64, blank, model=model, prompt="a star", seed=0)
        os.utime(kept.path(name * 64), (time.time() - days * DAY,) * 2)
    (kept.folder / "aa" / "cat.png").write_bytes(b"mine")
    return kept


def held(kept):
    assert (kept.folder / "aa" / "cat.png").read_bytes() == b"mine"
    return {name for name in MINE if kept.has(name * 64)}


def test_a_store_is_listed_by_model(store):
    code, out, _ = run(["store", str(store.folder), "--json"])
    told = json.loads(out)
    assert (code, told["pictures"]) == (0, 4)
    assert [(row["model"], row["pictures"], row["prompts"]) for row in told["models"]] == [
        ("mini-sd", 2, 1),
        ("mini-sdxl", 2, 1),
    ]
    size = sum(store.path(name * 64).stat().st_size for name in MINE)
    assert told["MB"] == pytest.approx(size / 1e6, abs=1e-3)
    for row in told["models"]:
        assert row["first written"] < row["last written"]
    assert held(store) == set(MINE)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (["--model", "mini-sd"], "cd"),
        (["--older-than", "30"], "bd"),
        (["--model", "mini-sd", "--older-than", "30"], "bcd"),
        (["--older-than", "0"], ""),
        (["--model", "nobody"], "abcd"),
        (["--model", "mini-sd", "--dry-run"], "abcd"),
    ],
)
def test_pruning_deletes_what_was_named_and_nothing_else(store, given, left):
    code, out, _ = run(["store", str(store.folder), "--prune", *given, "--json"])
    told = json.loads(out)
    assert code == 0 and held(store) == set(left)
    assert told["pictures"] == len(left)
    if "--dry-run" in given:
        assert told["would be deleted"] == 2 and "deleted" not in told
    else:
        assert told["deleted"] == 4 - len(left)
    assert run(["store", str(store.folder)])[0] == 0  # an empty one is still a store


def test_a_damaged_picture_is_told_and_can_be_pruned(store):
    store.path("a" * 64).write_bytes(b"cut off")
    told = json.loads(run(["store", str(store.folder), "--json"])[1])
    assert told["models"][0]["model"] == "damaged" and told["models"][0]["pictures"] == 1
    assert run(["store", str(store.folder), "--prune", "--model", "damaged"])[0] == 0
    assert held(store) == set("bcd")


def test_a_store_that_a_run_is_at_work_in_is_not_pruned(store):
    with claimed(store.folder):
        code, _, err = run(["store", str(store.folder), "--prune", "--older-than", "0"])
    assert code == 1 and "another run is at work" in err and held(store) == set(MINE)


def test_a_store_in_a_folder_that_was_there_before_is_pruned_but_not_claimed(store):
    (store.folder / MARK).unlink()
    assert run(["store", str(store.folder), "--prune", "--model", "mini-sd"])[0] == 0
    assert held(store) == set("cd") and not (store.folder / MARK).exists()


def test_a_sheet_takes_pictures_one_by_one_and_reduces_large_ones(tmp_path):
    def tiles():
        for value in (0, 100, 200):
            yield torch.full((3, 512, 1024), value, dtype=torch.uint8)

    report.save_sheet(tmp_path / "sheet.png", tiles(), 2)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (2 * 256 + 2, 2 * 128 + 2)
    places = [(0, 0), (258, 0), (0, 130), (258, 130), (256, 0), (0, 128)]
    assert [sheet.getpixel(at)[0] for at in places] == [0, 100, 200, 255, 255, 255]


def test_no_command_hides_an_import_of_the_library():
    for path in (ROOT / "loco_core" / "cli").glob("*.py"):
        tree = ast.parse(path.read_text())
        functions = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
        inner = [x for f in functions for x in ast.walk(f) if isinstance(x, ast.ImportFrom)]
        names = [x.module for x in inner if x.level or x.module.startswith("loco_core")]
        assert not names, f"{path.name}: {names}"


def test_a_concept_in_a_file_and_a_model_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_tiny_sd().save_pretrained("tiny")
    prompts = ["a house by van gogh", "a tree by van gogh"]
    concept = loco.Concept("van gogh", "style", prompts, ["a house", "a tree"])
    Path("gogh.yaml").write_text(yaml.safe_dump(vars(concept)))
    Path("gogh.json").write_text(json.dumps(vars(concept)))
    Path("kept.txt").write_text("a house by monet\n\na cat\n")
    line = "edit tiny --lam 0.01 --no-preserve-neutral --layers 3,5-6 --preserve kept.txt"
    line += " --preserve 'a dog' --preserve-name monet"
    for kind in ("yaml", "json"):
        given = [*shlex.split(line), "--concept", f"gogh.{kind}", "--out", kind]
        code, _, err = run(given)
        assert code == 0 and err.startswith("warning: <Edit: locoedit") and err.count("\n") == 1
    made = [loco.Edit.load(Path(kind) / "edit.safetensors") for kind in ("yaml", "json")]
    kept = ["a house by monet", "a cat", "a dog", *concept.renamed(["monet"])]
    with pytest.warns(UserWarning, match="by more than themselves"):  # a network of noise
        wanted = loco.locoedit(loco.load("tiny"), concept, [3, 5, 6], preserve=kept)
    assert made == [wanted, wanted]


def test_outside_of_shapeland_a_name_means_the_prompts_of_the_papers(tiny_sd):
    found = read.concept_of(tiny_sd, "style:Van Gogh", 12)
    assert found == loco.concepts.style("Van Gogh")
    assert read.concept_of(tiny_sd, "object:house", 1) == loco.concepts.object("house")
    with pytest.raises(ValueError, match="only style:NAME and object:NAME"):
        read.concept_of(tiny_sd, "color:red", 1)


@pytest.mark.parametrize(
    ("text", "wanted"), [("3", [3]), ("0-2", [0, 1, 2]), ("8, 9,1-2", [8, 9, 1, 2])]
)
def test_numbers_and_ranges_are_read(text, wanted):
    assert read.numbers(text) == wanted


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("loco layers mini-sd-n", {"mini-sd-natural"}),
        ("loco localize mini-sd --concept style:Mira", {"style:Mira Holt", "style:Mira Dunn"}),
        ("loco edit mini-sd --method ti", {"time"}),
        ("loco loc", {"localize"}),
    ],
)
def test_shells_complete_minis_concepts_choices_and_commands(typed, offered):
    words = shlex.split(typed)
    shown = {"_LOCO_COMPLETE": "complete_bash", "COMP_CWORD": str(len(words) - 1)}
    env = {**os.environ, **shown, "COMP_WORDS": "\n".join(words), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([loco_script()], env=env, capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()) == offered


def loco_script() -> str:
    """The script that pip put beside this Python."""
    return str(Path(sys.executable).parent / "loco")


def test_help_comes_without_torch_or_diffusers_or_plots():
    code = (
        "import sys; from loco_core.cli import main; code = main([*sys.argv[1:], '--help']); "
        "print(sorted({'torch', 'diffusers', 'transformers', 'pandas', 'matplotlib', 'PIL'} "
        "& set(sys.modules)), code)"
    )
    for given in ([], ["localize"]):
        command = [sys.executable, "-c", code, *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[] 0"


def test_without_arguments_there_is_help_and_version_is_the_libraries(capsys):
    assert cli.main([]) == 0 and "Exit codes" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"loco {loco.__version__}\n"
