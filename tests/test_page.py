"""The page of a call: what it says, that it is safe and needs no network, and what a browser makes of it."""

import contextlib
import json
import os
import re

import psutil
import pytest
from browser import CHROMIUM, Browser, Tab

from joblib_backends.timeline.model import KINDS, Mark, Row, Span, Timeline
from joblib_backends.timeline.page import page_of, readable_seconds

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

REPORT = {
    "function": "_fit_and_score(Pipeline)",
    "tier": "processes",
    "reason": "a task takes 0.6 s",
    "n_jobs": 2,
    "tasks": 4,
    "batches": 4,
    "seconds": 2.5,
    "speed_up": 1.91,
    "nbytes_moved": 2_100_000,
    "retries": 1,
    "lost_workers": 0,
    "predicted_seconds": None,
    "failed": False,
    "started_at": "2026-05-04T10:31:07+00:00",
    "messages": [{"kind": "warning", "text": "did not converge", "count": 3, "task": 2}],
    "advice": ["Leave room for the workers."],
    "something_of_a_later_version": 1,
}


def search():
    """Return a timeline of two workers with two batches each, one of them run again."""
    timeline = Timeline([Row("caller"), Row("process 1", "alpha"), Row("process 2", "beta")])
    for task in range(4):
        row, start = 1 + task % 2, 0.1 + task // 2
        kind = "retry" if task == 3 else "task"
        timeline.spans += [
            Span(row, kind, "_fit_and_score(Pipeline)", start, 0.9, task, 1, f"candidate 0 fold {task}"),
            Span(row, "fit", "SVC", start, 0.6),
            Span(row, "score", "accuracy", start + 0.6, 0.2, detail="test"),
        ]
    timeline.spans.append(Span(0, "transfer", "encode", 0.01, 0.02))
    timeline.marks.append(Mark(2, "worker lost", 0.95, "signal 9"))
    return timeline


def many(n_tasks=50_000, n_rows=16):
    """Return a timeline whose spans are far narrower than a pixel when all are seen."""
    rows = [Row(f"thread {row}") for row in range(n_rows)]
    spans = [Span(i % n_rows, "task", "square", i // n_rows * 1e-3, (1 + i % 89) * 1e-5, i, 1) for i in range(n_tasks)]
    return Timeline(rows, spans)


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def spans_of(data):
    """Undo what the page does to spans; times stay whole microseconds."""
    number, texts = 0, data["texts"]
    for row, length in data["lanes"]:
        start = 0
        for _ in range(length):
            start += data["start"][number]
            columns = [data[name][number] for name in ("took", "kind", "name", "task", "count", "detail")]
            took, kind, name, task, n_tasks, detail = columns
            yield row, data["kinds"][kind], texts[name], start, took, task, n_tasks, texts[detail]
            number += 1


def in_microseconds(span):
    start, end = round(span.start * 1e6), round((span.start + span.seconds) * 1e6)
    return span.row, span.kind, span.name, start, end - start, span.task, span.n_tasks, span.detail


# ---- the document


@pytest.mark.parametrize("timeline", [search(), many(500), Timeline()], ids=["search", "many", "empty"])
def test_the_data_of_the_page_is_the_timeline(timeline):
    data = data_of(page_of(REPORT, timeline))
    assert sorted(spans_of(data)) == sorted(map(in_microseconds, timeline.spans))
    assert [[data["texts"][text] for text in row] for row in data["rows"]] == [list(row) for row in timeline.rows]
    assert len(data["marks"]) == len(timeline.marks)


def test_phases_lie_in_a_lane_below_their_batch_and_the_next_batch_beside_it():
    data = data_of(page_of(REPORT, search()))
    assert data["lanes"] == [[0, 1], [1, 2], [1, 4], [2, 2], [2, 4]]


def test_spans_that_overlap_by_what_rounding_does_share_a_lane():
    spans = [Span(0, "task", "f", 0.0, 1.0000004, 0, 1), Span(0, "task", "f", 1.0000005, 1.0, 1, 1)]
    spans += [Span(0, "fit", "g", -0.0000004, 1.0000009), Span(0, "fit", "g", 1.0000004, 0.5)]
    assert data_of(page_of({}, Timeline([Row("caller")], spans)))["lanes"] == [[0, 2], [0, 2]]


HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "a\u2028b", "\udc80", "{{data}}", "&lt;'\"", "\\"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_name_gets_out_of_where_it_stands(name):
    timeline = Timeline([Row(name, name)], [Span(0, "task", name, 0, 1, 0, 1, name)], [Mark(0, name, 0.5, name)])
    report = dict.fromkeys(("function", "tier", "reason", "started_at"), name)
    page = page_of({**report, "messages": [{"kind": name, "text": name}], "advice": [name]}, timeline)
    calm = page_of({**report, "messages": [{"kind": "k", "text": "t"}], "advice": ["a"]}, search())
    page.encode()
    for tag in ("<script", "</script", "<!--", "alert(1)<"):
        assert page.count(tag) == calm.count(tag)
    assert "\u2028" not in data_text(page)
    data = data_of(page)
    assert name in data["texts"]
    assert [[data["texts"][text] for text in row] for row in data["rows"]] == [[name, name]]


def data_text(page):
    return page.partition('id="data">')[2].partition("</script>")[0]


@pytest.mark.parametrize("word", ["http:", "https:", "//", "src=", "@import", "url(", "fetch(", "XMLHttp", "import("])
def test_nothing_in_the_page_leads_to_a_network(word):
    # Comments of the script are all that begins with two slashes.
    page = re.sub(r"(?<=[\s;])// .*", "", page_of(REPORT, search()))
    assert word not in page


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0 µs", 0), ("25 µs", 25e-6), ("350 ms", 0.35), ("12.3 s", 12.3), ("4 min 05 s", 245), ("2 h 03 min", 7_380)],
)
def test_seconds_are_written_in_a_unit_that_a_person_reads(text, seconds):
    assert readable_seconds(seconds) == text


def test_the_page_says_what_the_report_knows_and_leaves_out_what_it_does_not():
    page = page_of(REPORT, search())
    for text in (
        *(
            "<h1>_fit_and_score(Pipeline) ",
            "<strong>processes</strong>: a task takes 0.6 s",
            ">2.1 MB<",
            ">1.91 times<",
        ),
        *(
            "Leave room for the workers.",
            "did not converge",
            "worker lost",
            "signal 9",
            "alpha",
            ">2026-05-04 10:31:07<",
        ),
        *('<span id="n-tasks">4</span> tasks, 4 batches, 9 phases on 3 rows', ">72&#8239;%<", ">done<"),
    ):
        assert text in page, text
    for text in ("predicted", "workers lost", "None", "later_version", "pickled with"):
        assert text not in page, text


def test_a_failed_call_and_one_of_which_nothing_is_known_have_pages():
    assert ">failed<" in page_of({**REPORT, "failed": True}, search())
    page = page_of({}, Timeline())
    assert '<span id="n-tasks">0</span> tasks, 0 batches, 0 phases on 0 rows' in page
    assert ">failed<" not in page
    assert ">done<" not in page


def test_the_page_says_what_the_timeline_does_not_hold():
    timeline = search()
    assert "; 4 tasks in the timeline" in page_of({"tasks": 9}, timeline)
    timeline.n_omitted = 1_234
    assert "; 1234 batches more were not recorded" in page_of({"tasks": 9}, timeline)


def test_a_task_that_ran_twice_counts_once():
    spans = [Span(0, "task", "f", at, 1, first, n) for at, (first, n) in enumerate([(0, 4), (2, 2), (4, 1), (-1, 3)])]
    assert '<span id="n-tasks">8</span>' in page_of({}, Timeline([Row("caller")], spans))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_colour_has_the_contrast_that_figures_and_text_need(theme):
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", page_of({}, Timeline()))
    colours = {name: both[theme] for name, *both in pairs}
    for number in range(len(KINDS)):
        assert contrast(colours[f"kind-{number}"], colours["idle"]) >= 3
        assert max(contrast(colours[f"kind-{number}"], ink) for ink in ("#111111", "#ffffff")) >= 4.5
    for name in ("ink", "quiet", "accent", "alarm"):
        assert min(contrast(colours[name], colours[behind]) for behind in ("back", "raised")) >= 4.5


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    """Return one browser for all tests; not one process of it stays."""
    running = Browser()
    try:
        yield running
    finally:
        running.close()
    assert not [process for process in psutil.process_iter() if in_group(process, running.group)]


def in_group(process, group):
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def open_page(browser, tmp_path):
    """Return a function that opens a page, which must complain about nothing and ask nobody for anything."""
    with contextlib.ExitStack() as stack:
        tabs = []

        def open_tab(timeline, report=REPORT, **options):
            path = tmp_path / "page.html"
            path.write_text(page_of(report, timeline), encoding="utf-8")
            tab = stack.enter_context(Tab(browser, path, **options))
            tabs.append(tab)
            tab.wait("window.timeline?.ready")
            return tab

        yield open_tab
        for tab in tabs:
            assert tab.complaints == []
            assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []


def plot_of(tab):
    """Return where the plot is in the window: left, top, width, height."""
    return tab.evaluate("(({left, top, width, height}) => [left, top, width, height])(plot.getBoundingClientRect())")


def tip_of(tab):
    tab.frame()
    return tab.evaluate("tip.hidden ? null : tip.innerText")


@in_a_browser
@pytest.mark.parametrize(
    ("timeline", "counts"),
    [(search(), [4, 13, 3]), (many(), [50_000, 50_000, 16]), (Timeline(), [0, 0, 0])],
    ids=["small", "large", "empty"],
)
def test_a_browser_draws_all_of_it_without_a_complaint(open_page, timeline, counts):
    tab = open_page(timeline, {**REPORT, "tasks": counts[0]})
    assert tab.evaluate("[timeline.nTasks, timeline.nSpans, timeline.nRows]") == counts
    assert tab.evaluate("document.getElementById('n-tasks').textContent") == str(counts[0])
    assert (tab.evaluate("timeline.drawn") > 0) == bool(timeline.spans)


@in_a_browser
def test_what_is_narrower_than_a_pixel_is_drawn_together(open_page):
    tab = open_page(many())
    width = plot_of(tab)[2]
    assert tab.evaluate("timeline.drawn") <= 16 * width < 50_000


@in_a_browser
def test_a_script_that_is_not_the_page_s_own_is_refused_and_seen_by_these_tests(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page_of(REPORT, search()).replace("<h1>", "<script>window.intruder = 1</script><h1>"))
    with Tab(browser, path) as tab:
        tab.wait("window.timeline?.ready")
        assert tab.evaluate("window.intruder") is None
        (complaint,) = tab.complaints
        assert "Content Security Policy" in complaint["entry"]["text"]


@in_a_browser
def test_the_theme_follows_the_system_the_address_and_the_button(open_page):
    tab = open_page(search())
    back = "getComputedStyle(document.body).backgroundColor"
    # From a copy: reading the canvas itself often has the browser complain.
    copy = "new OffscreenCanvas(1, 1).getContext('2d')"
    corner = f"((pen) => (pen.drawImage(canvas, -1, -1), [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3)))({copy})"
    light, drawn_light = tab.evaluate(back), tab.evaluate(corner)
    tab.emulate(**{"prefers-color-scheme": "dark"})
    tab.frame()
    dark, drawn_dark = tab.evaluate(back), tab.evaluate(corner)
    assert dark != light
    assert max(drawn_dark) < 100 < min(drawn_light)
    # Paper is white.
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(corner) == drawn_light
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate(corner) == drawn_dark
    tab.evaluate("theme.click()")
    assert [tab.evaluate(back), tab.evaluate(corner)] == [light, drawn_light]
    assert open_page(search(), fragment="#theme=dark").evaluate(back) == dark
    assert open_page(search(), dark=True).evaluate(corner) == drawn_dark


@in_a_browser
def test_what_lies_under_the_mouse_is_told(open_page):
    tab = open_page(search())
    left, top, width, _ = plot_of(tab)
    second = width / 2.5
    row = 26 + 25 + 4
    tab.mouse("mouseMoved", left + 0.5 * second, top + row + 8)
    tip = tip_of(tab)
    for text in ("_fit_and_score(Pipeline)", "candidate 0 fold 0", "#0", "100 ms", "900 ms", "process 1, alpha"):
        assert text in tip
    tab.mouse("mouseMoved", left + 0.8 * second, top + row + 24)
    assert tip_of(tab).startswith("accuracy\n\ntest\n\nkind\nscore")
    tab.mouse("mouseMoved", left + 0.95 * second, top + row + 48)
    assert tip_of(tab).startswith("worker lost\n\nsignal 9")
    tab.mouse("mouseMoved", left + 2.3 * second, top + row + 8)
    assert tip_of(tab) is None


@in_a_browser
def test_a_click_keeps_the_tip_until_one_beside_it(open_page):
    tab = open_page(search())
    left, top, width, _ = plot_of(tab)
    tab.click(left + 0.2 * width, top + 60)
    tab.mouse("mouseMoved", 5, 5)
    assert "#0" in tip_of(tab)
    tab.click(*tab.evaluate("(({left, top}) => [left + 9, top + 9])(tip.getBoundingClientRect())"))
    assert "#0" in tip_of(tab)
    tab.click(left + 0.97 * width, top + 60)
    assert tip_of(tab) is None


@in_a_browser
def test_the_keyboard_goes_from_span_to_span_and_says_them(open_page):
    tab = open_page(search())
    said = "document.getElementById('said').textContent"
    tab.evaluate("document.querySelector('[data-kind]').focus()")
    while tab.evaluate("document.activeElement.id") != "plot":
        tab.key("Tab", code="Tab", windowsVirtualKeyCode=9)
    assert tip_of(tab).startswith("encode")
    tab.key("ArrowDown")
    assert "candidate 0 fold 0" in tab.evaluate(said)
    tab.key("n")
    assert "candidate 0 fold 2" in tab.evaluate(said)
    tab.key("p")
    assert "candidate 0 fold 0" in tab.evaluate(said)
    tab.key("Escape")
    assert tip_of(tab) is None


@in_a_browser
def test_zoom_and_pan_change_what_is_drawn_and_0_brings_all_back(open_page):
    tab = open_page(many())
    seen = "[timeline.drawn, document.getElementById('range').textContent]"
    left, top, width, _ = plot_of(tab)
    everything = tab.evaluate(seen)
    # Without the focus, the wheel is the page's.
    tab.mouse("mouseWheel", left + width / 2, top + 60, deltaX=0, deltaY=-240)
    tab.frame()
    assert tab.evaluate(seen) == everything
    for _ in range(3):
        tab.mouse("mouseWheel", left + width / 2, top + 60, deltaX=0, deltaY=-400, modifiers=2)
    tab.frame()
    near = tab.evaluate(seen)
    # One by one, no more together: some forty in each row.
    assert 16 * 30 < near[0] < everything[0]
    tab.mouse("mouseMoved", left + width / 2, top + 60)
    tab.mouse("mousePressed", left + width / 2, top + 60, button="left", clickCount=1)
    tab.mouse("mouseMoved", left + width / 4, top + 60, button="left", buttons=1)
    tab.mouse("mouseReleased", left + width / 4, top + 60, button="left", clickCount=1)
    tab.frame()
    assert tab.evaluate(seen)[1] != near[1]
    tab.evaluate("plot.focus()")
    tab.key("0")
    tab.frame()
    assert tab.evaluate(seen) == everything


@in_a_browser
def test_motion_ends_where_a_jump_does(open_page):
    seen = []
    for still in (True, False):
        tab = open_page(search(), still=still)
        tab.evaluate("document.querySelector('[data-zoom]').click()")
        tab.wait("/^625 ms .* 1.88 s$/.test(range.textContent)")
        seen.append(tab.evaluate("timeline.drawn"))
    assert seen[0] == seen[1]


@in_a_browser
def test_a_kind_can_be_hidden(open_page):
    tab = open_page(search())
    drawn = tab.evaluate("timeline.drawn")
    tab.evaluate(f"document.querySelector('[data-kind=\"{KINDS.index('fit')}\"]').click()")
    tab.frame()
    # Four fits in four boxes.
    assert tab.evaluate("timeline.drawn") == drawn - 4
    assert tab.evaluate("document.querySelectorAll('[aria-pressed=false]').length") == 1


@in_a_browser
@pytest.mark.parametrize("width", [400, 1200])
def test_many_rows_scroll_on_a_canvas_that_is_no_higher_than_the_window(open_page, width):
    tab = open_page(many(5_000, 500), {}, width=width)
    assert tab.evaluate("view.scrollHeight > 10_000 && canvas.height < innerHeight")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate("view.scrollIntoView({block: 'end'}), view.scrollTop = view.scrollHeight")
    left, top, *_ = plot_of(tab)
    bottom = tab.evaluate("view.getBoundingClientRect().bottom")
    tab.mouse("mouseMoved", left + 5, bottom - 12)
    assert top < 0
    assert "thread 499" in tip_of(tab)
