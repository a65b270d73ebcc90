"""The demo: its planner says what the plan says, and a visitor with a browser gets what the page promises."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from factories import tiny_clip, tiny_processor
from PIL import Image
from scripts import ROOT, load_script, run_main

from hf_dpclip import PrivacyPlan, PrivacyStatement
from hf_dpclip.advice import advice


pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")

APP = load_script(ROOT / "examples" / "app.py")
CHROMIUM = shutil.which("chromium")
BY_EPSILON, BY_NOISE = APP.BY_EPSILON, APP.BY_NOISE
SMALL = PrivacyPlan(4000, 500, 250, 8, 1.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny private model, as `train.py` leaves it."""
    folder = tmp_path_factory.mktemp("private-clip")
    tiny_clip().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    PrivacyStatement(SMALL, steps=8).save(folder)
    return folder


# ---- The planner ----


@pytest.mark.parametrize(
    ("given", "value", "expected"),
    [
        (BY_NOISE, 1.5, SMALL),
        (
            BY_EPSILON,
            2.0,
            PrivacyPlan.calibrate(
                target_epsilon=2.0, num_examples=4000, expected_batch_size=500, num_microbatches=250, num_steps=8
            ),
        ),
    ],
)
def test_the_planner_shows_the_figures_of_the_plan(given, value, expected):
    words, figure = APP.plan_and_draw(4000, 500, 1, 250, 10_000, given, value)
    assert APP.plan_from_inputs(4000, 500, 1, 250, given, value) == expected
    for figures in (f"**{expected.epsilon():.3g}**", f"**{expected.noise_multiplier:.3g}**", "| steps T | 8 |"):
        assert figures in words
    assert f"{expected.signal_to_noise(10_000):.3g} in a step" in words
    epsilons = figure.axes[0].lines[0].get_ydata()
    assert (epsilons[0], epsilons[-1]) == (0, expected.epsilon())


def test_the_curve_of_microbatches_goes_through_the_plan():
    _, figure = APP.plan_and_draw(4000, 512, 1, 256, 10_000, BY_NOISE, 1.5)
    several, single, this_plan, threshold = figure.axes[1].lines
    ratios = dict(zip(several.get_xdata(), several.get_ydata()))
    assert ratios[256] == this_plan.get_ydata()[0]
    # Twice the microbatches, and half the sensitivity.
    assert single.get_ydata()[0] == pytest.approx(4 * ratios[256])
    assert threshold.get_ydata()[0] == APP.HOPELESS_SIGNAL_TO_NOISE


def test_the_planner_warns_as_a_run_does():
    hopeless = PrivacyPlan(4000, 500, 1, 8, 1.5)
    words, _ = APP.plan_and_draw(4000, 500, 1, 1, 1_000_000, BY_NOISE, 1.5)
    assert advice(hopeless, 1_000_000) in words
    assert "`public_negatives`" in APP.plan_and_draw(4000, 500, 1, 500, 10_000, BY_NOISE, 1.5)[0]


def test_the_arguments_it_shows_make_the_same_plan(tmp_path):
    from hf_dpclip import DPTrainingArguments
    from hf_dpclip.planning import make_plan

    code = APP.arguments_of(SMALL).replace("```python", "").replace("```", "").strip()
    call = code.replace("DPTrainingArguments(", f"DPTrainingArguments({str(tmp_path)!r}, use_cpu=True,")
    assert make_plan(eval(call, {"DPTrainingArguments": DPTrainingArguments}), 4000) == SMALL


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((None, 500, 1, 250, 10_000, BY_NOISE, 1.5), "records n must be a number above 0"),
        ((4000, 0, 1, 250, 10_000, BY_NOISE, 1.5), "batch size B must be a number above 0"),
        ((4000, 5000, 1, 250, 10_000, BY_NOISE, 1.5), "at most the 4000 privacy units"),
        ((4000, 500, 1, 501, 10_000, BY_NOISE, 1.5), "at most expected_batch_size=500"),
        ((4000, 500, 1, None, 10_000, BY_NOISE, 1.5), "num_microbatches=None is not possible"),
        ((4000, 500, -1, 250, 10_000, BY_NOISE, 1.5), "epochs must be a number above 0"),
        ((4000, 500, 1, 250, 0, BY_NOISE, 1.5), "trainable parameters d must be at least 1"),
        ((4000, 500, 1, 250, 10_000, BY_EPSILON, 0), "target ε must be a number above 0"),
        ((4000, 500, 1, 250, 10_000, BY_NOISE, 1e-6), "outside of what this page computes: 0.1 to 1000"),
        ((4000, 1, 1e6, 1, 10_000, BY_EPSILON, 3), "steps are more than this page computes"),
    ],
)
def test_inputs_that_make_no_plan_get_a_sentence(inputs, message):
    words, figure = APP.plan_and_draw(*inputs)
    assert words.startswith("**This plan is not possible.**") and message in words
    assert figure is None


# ---- The model ----


def picture(seed=0):
    return Image.effect_noise((20, 20), 50 + seed)


def test_classification_and_search_agree_with_the_model(checkpoint):
    model = APP.PrivateModel(str(checkpoint))
    shares, message = APP.in_words(model.classify)(picture(), "cat, dog", "a {}")
    logits = model.similarities([picture()], ["a cat", "a dog"])[0]
    assert list(shares) == ["cat", "dog"] and message == ""
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["cat"] > shares["dog"]) == bool(logits[0] > logits[1])
    found = model.search([(picture(seed), None) for seed in range(4)], "a dog")
    scores = [float(score) for _, score in found]
    assert scores == sorted(scores, reverse=True) and len(found) == 4


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((None, "cat, dog", "a {}"), "There is no picture"),
        ((picture(), "cat", "a {}"), "at least two classes"),
        ((picture(), "cat, cat", "a {}"), "each once"),
        ((picture(), "cat, dog", "a photo"), "has no {} for the class name"),
    ],
)
def test_nothing_to_classify_gets_a_sentence(checkpoint, inputs, message):
    result, said = APP.in_words(APP.PrivateModel(str(checkpoint)).classify)(*inputs)
    assert result is None and message in said


@pytest.mark.parametrize(
    ("inputs", "message"), [((None, "a dog"), "no pictures"), (([(picture(), None)], " "), "Say")]
)
def test_nothing_to_search_gets_a_sentence(checkpoint, inputs, message):
    result, said = APP.in_words(APP.PrivateModel(str(checkpoint)).search)(*inputs)
    assert result is None and message in said


def test_the_statement_is_shown_and_an_edited_or_missing_one_is_exposed(checkpoint, tmp_path):
    assert f"({SMALL.epsilon():.4g}, {SMALL.target_delta:.3g})" in APP.PrivateModel(str(checkpoint)).claim()
    edited = shutil.copytree(checkpoint, tmp_path / "edited")
    values = json.loads((edited / "privacy.json").read_text())
    (edited / "privacy.json").write_text(json.dumps({**values, "epsilon": values["epsilon"] / 2}))
    for change in ("was edited", "does not exist"):
        claim = APP.PrivateModel(str(edited)).claim()
        assert "Nothing can be claimed" in claim and change in claim
        (edited / "privacy.json").unlink(missing_ok=True)


def test_a_model_that_is_not_there_stops_the_start(monkeypatch):
    with pytest.raises(SystemExit, match="no/such-model is neither a folder with a model nor on the Hub"):
        run_main(monkeypatch, APP, "--model", "no/such-model")


# ---- In a browser ----


@pytest.fixture(scope="module")
def page_address(checkpoint):
    """The demo, started as a Space starts it."""
    address = "http://127.0.0.1:7963"
    command = [sys.executable, str(ROOT / "examples" / "app.py"), "--port", "7963"]
    server = subprocess.Popen(command, env={**os.environ, "MODEL": str(checkpoint)})
    try:
        wait_for(address, server)
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_for(address, server):
    for _ in range(300):
        assert server.poll() is None, "the demo has stopped"
        try:
            return urllib.request.urlopen(address)
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, page_address):
    """The page, which must not ask any other machine for anything."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_address)
    yield page
    page.close()
    elsewhere = [url for url in asked if not url.startswith((page_address, "data:", "blob:", "ws://127.0.0.1"))]
    assert not elsewhere


@pytest.mark.slow
def test_the_planner_follows_what_is_typed(page):
    page.get_by_text("ε after all steps").wait_for()
    page.locator("img[src*='image']").first.wait_for()
    page.get_by_label("noise multiplier σ").check()
    page.get_by_label("its value").fill("1.5")
    page.get_by_label("records n").fill("4000")
    page.get_by_label("expected batch size B").fill("500")
    page.get_by_label("epochs").fill("1")
    page.get_by_label("microbatches per step K").fill("250")
    page.get_by_text(f"{SMALL.epsilon():.3g} at δ").wait_for()
    page.get_by_label("microbatches per step K").fill("600")
    page.get_by_text("at most expected_batch_size=500").wait_for()
    page.locator("img[src*='image']").first.wait_for(state="hidden")


@pytest.mark.slow
def test_a_picture_is_classified_beside_the_statement(page, checkpoint, tmp_path):
    picture(seed=3).save(tmp_path / "picture.png")
    shares = APP.PrivateModel(str(checkpoint)).classify(picture(seed=3), "cat, dog", "a {}")
    page.get_by_role("tab", name="Classify").click()
    page.get_by_text(f"({SMALL.epsilon():.4g}, {SMALL.target_delta:.3g})-differentially private").first.wait_for()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "picture.png")
    page.locator("img[src*='picture.png']").wait_for()
    page.get_by_label("classes, separated by commas").fill("cat, dog")
    page.get_by_label("description of a class").fill("a {}")
    page.get_by_role("button", name="Classify").click()
    page.get_by_role("heading", name=max(shares, key=shares.get)).wait_for()
    page.get_by_label("classes, separated by commas").fill("cat")
    page.get_by_role("button", name="Classify").click()
    page.get_by_text("Give at least two classes").wait_for()


@pytest.mark.slow
def test_pictures_are_searched(page):
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("description", exact=True).fill("a dog")
    page.get_by_role("button", name="Search").click()
    captions = page.locator(".caption-label")
    captions.nth(9).wait_for()
    scores = [float(text) for text in captions.all_inner_texts()]
    assert scores == sorted(scores, reverse=True) and len(scores) == 10
