"use strict";
// Draws the timeline of a call on a canvas that stays in view while the rows scroll past it, so that its size does not
// depend on their number. What is narrower than a pixel is never drawn one by one: a pixel shows what took most of it,
// the fainter, the less of it was busy. Times are whole microseconds since the call began.
(() => {
  const $ = (id) => document.getElementById(id);
  const view = $("view"), plot = $("plot"), canvas = $("canvas"), tip = $("tip"), ring = $("ring");
  const pen = canvas.getContext("2d");

  // ---- data: columns, lane by lane; spans of a lane follow each other without overlap

  const data = JSON.parse($("data").textContent);
  const { texts, kinds } = data, kind = Uint8Array.from(data.kind);
  const n = data.start.length;
  const start = Float64Array.from(data.start), end = new Float64Array(n);
  const lanes = [], lanesOf = data.rows.map(() => []), marksOf = data.rows.map(() => []);
  for (const [row, length] of data.lanes) {
    const first = lanes.length ? lanes[lanes.length - 1].last : 0;
    const lane = { row, first, last: first + length, level: lanesOf[row].length };
    for (let i = first; i < lane.last; i++) {
      if (i > first) start[i] += start[i - 1];
      end[i] = start[i] + data.took[i];
    }
    lanes.push(lane);
    lanesOf[row].push(lane);
  }
  for (const [row, at, name, detail] of data.marks) marksOf[row].push({ row, at, name: texts[name], detail: texts[detail] });
  const [BEGIN, END] = [data.extent[0], Math.max(data.extent[1], data.extent[0] + 1)];

  // ---- what is seen

  const SHORTEST = 5; // microseconds across the width: below, rounding shows
  const FIRST_LANE = 16, LANE = 15, PADDING = 4, AXIS = 26, EDGE = 3;
  let lo = BEGIN, hi = END, width = 1, height = 1, tops = [], heights = [];
  let colour = {}, hidden = new Set(), selected = null, pinned = false, requested = 0, gliding = 0;
  const result = { nTasks: countTasks(), nSpans: n, nRows: data.rows.length, ready: false, drawn: 0 };
  window.timeline = result;

  const oneFunction = new Set(data.name.filter((_, i) => data.count[i])).size < 2;

  const scale = () => width / (hi - lo);
  const toX = (time) => (time - lo) * scale();
  const toTime = (x) => lo + x / scale();

  /** Each task once: one that was run again is in several spans. */
  function countTasks() {
    const intervals = [];
    let count = 0, reached = 0;
    for (let i = 0; i < n; i++) {
      if (data.count[i] && data.task[i] < 0) count += data.count[i];
      else if (data.count[i]) intervals.push([data.task[i], data.task[i] + data.count[i]]);
    }
    for (const [first, last] of intervals.sort((a, b) => a[0] - b[0])) {
      count += Math.max(0, last - Math.max(first, reached));
      reached = Math.max(reached, last);
    }
    return count;
  }

  /** The first i in [first, last) for which the sorted `values` exceed `bound`, else last. */
  function firstAbove(values, bound, first, last) {
    while (first < last) {
      const middle = (first + last) >> 1;
      if (values[middle] > bound) last = middle;
      else first = middle + 1;
    }
    return first;
  }

  // ---- units

  const trimmed = (value, digits) => String(Number(value.toFixed(digits)));

  /** A moment or a duration in readable units, exact to about `step` microseconds. */
  function readable(time, step) {
    const size = Math.abs(time), digits = (unit) => Math.max(0, Math.min(6, Math.ceil(-Math.log10(step / unit) - 1e-9)));
    if (!Math.round(size)) return "0";
    if (size < 1e3) return `${trimmed(time, 0)} µs`;
    if (size < 1e6) return `${trimmed(time / 1e3, digits(1e3))} ms`;
    if (size < 6e7) return `${trimmed(time / 1e6, digits(1e6))} s`;
    const unit = step >= 6e7 ? 6e7 : 1e6, whole = Math.round(time / step) * step;
    const hours = Math.floor(whole / 3.6e9), minutes = Math.floor((whole % 3.6e9) / 6e7);
    const seconds = unit === 6e7 ? "" : trimmed((whole % 6e7) / 1e6, digits(1e6));
    return [hours && `${hours} h`, minutes && `${minutes} min`, seconds && seconds !== "0" && `${seconds} s`].filter(Boolean).join(" ");
  }

  const duration = (time) => readable(time, 10 ** Math.max(0, Math.floor(Math.log10(Math.max(1, time))) - 2));

  // Round numbers of microseconds, then of seconds, minutes and hours.
  const STEPS = [1, 10, 100, 1e3, 1e4, 1e5].flatMap((power) => [power, 2 * power, 5 * power]);
  STEPS.push(...[1e6, 6e7].flatMap((unit) => [1, 2, 5, 10, 15, 30].map((count) => count * unit)));
  STEPS.push(...[1, 2, 6, 12, 24, 72, 168, 720].map((hours) => hours * 3.6e9));
  const tickStep = (least) => STEPS.find((step) => step >= least) || STEPS[STEPS.length - 1];

  // ---- drawing

  /** Ask for one frame, however much has changed before it. */
  function draw() {
    if (!requested) requested = requestAnimationFrame(() => { requested = 0; drawNow(); });
  }

  function drawNow() {
    result.drawn = 0;
    const ratio = window.devicePixelRatio || 1;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.globalAlpha = 1;
    pen.fillStyle = colour.back;
    pen.fillRect(0, 0, width, height);
    const ticks = tickTimes();
    const offset = AXIS - view.scrollTop;
    for (let row = 0; row < tops.length; row++) {
      const top = tops[row] + offset;
      if (top + heights[row] > AXIS && top < height) drawRow(row, top, ticks);
    }
    drawAxis(ticks);
    placeRing();
  }

  function drawRow(row, top, ticks) {
    const bottom = top + heights[row];
    pen.fillStyle = colour.idle;
    pen.fillRect(toX(BEGIN), top + PADDING, (END - BEGIN) * scale(), inside(row));
    pen.fillStyle = colour.line;
    pen.fillRect(0, bottom - 1, width, 1);
    for (const [x] of ticks.places) pen.fillRect(x, top, 1, heights[row] - 1);
    for (const lane of lanesOf[row]) drawLane(lane, top);
    let before = -Infinity;
    for (const { at } of marksOf[row]) {
      if (toX(at) - before >= 1) drawMark((before = toX(at)), top, bottom);
    }
  }

  const inside = (row) => heights[row] - 2 * PADDING - 1;

  /** Where the spans of a lane lie, if its row begins at `top`: [y, height]. A lane that is alone has the whole row. */
  function place({ row, level }, top) {
    if (level) return [top + PADDING + FIRST_LANE + (level - 1) * LANE + 1, LANE - 3];
    return [top + PADDING, lanesOf[row].length > 1 ? FIRST_LANE : inside(row)];
  }

  function drawLane(lane, top) {
    const [y, tall] = place(lane, top), boxTall = inside(lane.row);
    const perTime = scale(), busy = new Float64Array(kinds.length);
    // One run of pixels that look alike is one rectangle.
    let column = -1, run = null;
    const endRun = () => {
      if (run) fill(run.x, y, run.width, tall, run.kind, run.alpha);
      run = null;
    };
    const endColumn = () => {
      if (column < 0) return;
      let most = 0, sum = 0;
      for (let k = 0; k < busy.length; k++) {
        sum += busy[k];
        if (busy[k] > busy[most]) most = k;
      }
      const alpha = 0.4 + 0.15 * Math.ceil(4 * Math.min(1, sum)); // Four steps: more would only break the runs.
      if (run && run.kind === most && run.alpha === alpha && run.x + run.width === column) run.width++;
      else {
        endRun();
        run = { x: column, width: 1, kind: most, alpha };
      }
      busy.fill(0);
      column = -1;
    };
    for (let i = firstAbove(end, lo, lane.first, lane.last); i < lane.last && start[i] <= hi; i++) {
      if (hidden.has(kind[i])) continue;
      const x = (start[i] - lo) * perTime, wide = (end[i] - start[i]) * perTime;
      if (wide < 1.5) {
        const pixel = Math.max(0, Math.floor(x));
        if (pixel !== column) endColumn();
        column = pixel;
        busy[kind[i]] += Math.max(wide, 0.02);
        continue;
      }
      endColumn();
      endRun();
      const left = Math.max(x, -2), right = Math.min(x + wide, width + 2);
      const seen = right - left - Math.min(1, wide / 16); // A hair between neighbours, where there is room.
      const boxed = tall < boxTall && lane.level === 0 && data.count[i] > 0;
      if (boxed) fill(left, y, seen, boxTall, kind[i], 0.26);
      fill(left, y, seen, boxed ? EDGE : tall, kind[i], 1);
      if (kinds[kind[i]] === "retry" && seen > 6) hatch(left, y, seen, tall);
      if (seen > 22) write(i, left, y + (boxed ? EDGE : 0), seen, tall - (boxed ? EDGE : 0), boxed);
    }
    endColumn();
    endRun();
  }

  function fill(x, y, wide, tall, k, alpha) {
    pen.globalAlpha = alpha;
    pen.fillStyle = colour.kinds[k];
    pen.fillRect(x, y, wide, tall);
    pen.globalAlpha = 1;
    result.drawn++;
  }

  /** Stripes: what was run again is told by more than its colour. */
  function hatch(x, y, wide, tall) {
    pen.save();
    pen.beginPath();
    pen.rect(x, y, wide, tall);
    pen.clip();
    pen.beginPath();
    for (let at = x - tall; at < x + wide; at += 7) {
      pen.moveTo(at, y + tall);
      pen.lineTo(at + tall, y);
    }
    pen.strokeStyle = colour.back;
    pen.globalAlpha = 0.45;
    pen.stroke();
    pen.restore();
  }

  const widths = new Map();
  function widthOf(text) {
    if (!widths.has(text)) widths.set(text, pen.measureText(text).width);
    return widths.get(text);
  }

  /** Write the most telling text that fits: of a batch its task, for most calls have one function only. */
  function write(i, x, y, wide, tall, boxed) {
    const room = Math.min(x + wide, width) - Math.max(x, 0) - 7, name = texts[data.name[i]], choices = [name];
    if (data.count[i] && data.task[i] >= 0) {
      const detail = texts[data.detail[i]], named = oneFunction ? numbers(i) : `${name} ${numbers(i)}`;
      choices.splice(0, 1, detail && `${named}  ${detail}`, named, numbers(i));
    }
    let text = choices.find((choice) => choice && widthOf(choice) <= room);
    if (!text) {
      const kept = Math.floor((name.length * room) / widthOf(name)) - 1;
      if (kept < 3 || choices.length > 1) return;
      text = `${name.slice(0, kept)}…`;
    }
    pen.fillStyle = boxed ? colour.ink : colour.inks[kind[i]];
    pen.fillText(text, Math.max(x, 0) + 4, y + tall / 2 + 0.5);
  }

  function drawMark(x, top, bottom) {
    if (x < -6 || x > width + 6) return;
    pen.fillStyle = colour.ink;
    pen.strokeStyle = colour.back;
    pen.fillRect(Math.round(x) - 0.5, top, 1, bottom - top - 1);
    pen.beginPath();
    pen.moveTo(x - 5, top);
    pen.lineTo(x + 5, top);
    pen.lineTo(x, top + 8);
    pen.closePath();
    pen.stroke();
    pen.fill();
  }

  function tickTimes() {
    const step = tickStep(((hi - lo) / width) * 90), places = [];
    // Deep inside of a long call, ticks count from a round moment at the left: in full, they would all read the same.
    const base = step * 2000 < lo ? Math.floor(lo / (step * 10)) * step * 10 : 0;
    for (let tick = Math.ceil(lo / step) * step; tick <= hi; tick += step) places.push([Math.round(toX(tick)), tick - base]);
    return { step, base, places };
  }

  function drawAxis({ step, base, places }) {
    pen.fillStyle = colour.raised;
    pen.fillRect(0, 0, width, AXIS);
    pen.fillStyle = colour.line;
    pen.fillRect(0, AXIS - 1, width, 1);
    for (const [x] of places) pen.fillRect(x, AXIS - 7, 1, 7);
    pen.fillStyle = colour.quiet;
    for (const [x, time] of places) {
      const text = base ? `+${readable(time, step)}` : readable(time, step);
      if (x + 4 + widthOf(text) < width) pen.fillText(text, x + 4, AXIS / 2);
    }
    $("range").textContent = base ? `${readable(base, step)} +` : `${readable(lo, step / 10)} – ${readable(hi, step / 10)}`;
  }

  // ---- looking at spans

  const SPAN = "span", MARK = "mark";

  /** What lies at a point of the plot: a mark, the innermost span, or nothing. */
  function hit(x, y) {
    const row = firstAbove(tops, y - AXIS, 0, tops.length) - 1;
    if (row < 0 || y - AXIS > tops[row] + heights[row]) return null;
    const time = toTime(x), near = 4 / scale();
    const mark = marksOf[row].find((each) => Math.abs(each.at - time) <= near * 1.5);
    if (mark) return { type: MARK, row, mark };
    // From the lane under the pointer outwards: the box of a batch reaches below its own lane.
    for (const lane of [...lanesOf[row]].reverse()) {
      if (lane.level && y < place(lane, tops[row] + AXIS)[0]) continue;
      const i = spanAt(lane, time, near);
      if (i >= 0) return { type: SPAN, row, lane, i };
    }
    return null;
  }

  /** The span of a lane at a time, or the nearest one within `near`, as thin ones are hard to meet; else -1. */
  function spanAt(lane, time, near) {
    const after = firstAbove(start, time, lane.first, lane.last);
    let best = -1, distance = near;
    for (const i of [after - 1, after]) {
      if (i < lane.first || i >= lane.last || hidden.has(kind[i])) continue;
      const away = Math.max(0, start[i] - time, time - end[i]);
      if (away <= distance) [best, distance] = [i, away];
    }
    return best;
  }

  function numbers(i) {
    const first = data.task[i], last = first + data.count[i] - 1;
    return last > first ? `#${first}–${last}` : `#${first}`;
  }

  /** What a tip says: its title, the number of its colour, a detail, and lines of (name, value). */
  function described(target) {
    const [name, host] = data.rows[target.row].map((text) => texts[text]);
    const row = ["on", host ? `${name}, ${host}` : name];
    if (target.type === MARK) {
      return [target.mark.name, -1, target.mark.detail, [["at", duration(target.mark.at)], row]];
    }
    const { i } = target, count = data.count[i];
    const tasks = count ? [count > 1 ? "tasks" : "task", data.task[i] < 0 ? String(count) : numbers(i) + (count > 1 ? ` (${count})` : "")] : ["", ""];
    const exact = 10 ** Math.max(0, Math.floor(Math.log10(Math.max(1, end[i] - start[i]))) - 2);
    return [texts[data.name[i]] || kinds[kind[i]], kind[i], texts[data.detail[i]], [
      ["kind", count ? `${kinds[kind[i]]}, batch` : kinds[kind[i]]], tasks, ["start", readable(start[i], exact)],
      ["took", duration(end[i] - start[i])], row,
    ]];
  }

  function showTip(target, x, y) {
    const [title, k, detail, lines] = described(target);
    const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
    const heading = make("strong", title), list = make("dl", "");
    if (k >= 0) heading.prepend(Object.assign(make("i", ""), { className: `kind-${k}` }));
    for (const [name, value] of lines) if (value) list.append(make("dt", name), make("dd", value));
    tip.replaceChildren(heading, make("p", detail), list);
    tip.hidden = false;
    const { offsetWidth: wide, offsetHeight: tall } = tip;
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - wide - 8))}px`;
    tip.style.top = `${Math.max(4, y + 18 + tall > innerHeight ? y - tall - 12 : y + 18)}px`;
  }

  /** Where the spans or marks of a target are drawn: [x, y, width, height] in the plot, which scrolls with the rows. */
  function boxOf(target) {
    const top = tops[target.row] + AXIS;
    if (target.type === MARK) return [toX(target.mark.at) - 7, top, 14, heights[target.row] - 1];
    const [y, tall] = place(target.lane, top);
    const x = Math.max(-4, toX(start[target.i])), right = Math.min(width + 4, toX(end[target.i]));
    return [x, y, Math.max(3, right - x), data.count[target.i] ? inside(target.row) : tall];
  }

  function placeRing() {
    const box = selected && boxOf(selected);
    ring.hidden = !box || box[0] > width || box[0] + box[2] < 0;
    if (ring.hidden) return;
    const [x, y, wide, tall] = box;
    Object.assign(ring.style, { left: `${x - 2}px`, top: `${y - 2}px`, width: `${wide + 4}px`, height: `${tall + 4}px` });
  }

  function select(target, keep) {
    selected = target;
    pinned = Boolean(target && keep);
    tip.classList.toggle("pinned", pinned);
    if (!target) tip.hidden = true;
    placeRing();
  }

  /** Select by the keyboard: bring it into view, show its tip there, and say it. */
  function visit(target) {
    if (!target) return;
    const top = tops[target.row], low = top + heights[target.row] + AXIS;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (low > view.scrollTop + view.clientHeight) view.scrollTop = low - view.clientHeight;
    const { i } = target;
    if (end[i] < lo || start[i] > hi) {
      const half = (hi - lo) / 2;
      look(start[i] - half, start[i] + half);
    }
    select(target, true);
    const frame = plot.getBoundingClientRect(), [x, y, , tall] = boxOf(target);
    showTip(target, frame.left + Math.max(0, x), frame.top + y + tall - 14);
    $("said").textContent = described(target).flat().filter((part) => part && typeof part === "string").join(", ");
  }

  /** The next or previous span that is not hidden, in the order of the lanes. */
  function beside(step) {
    if (!selected || selected.type === MARK) return nearest(0);
    const { lane, row } = selected;
    let i = selected.i + step;
    while (i >= lane.first && i < lane.last && hidden.has(kind[i])) i += step;
    return i >= lane.first && i < lane.last ? { type: SPAN, row, lane, i } : null;
  }

  /** In a row below or above: the span nearest to the selected one; without one, to what is seen first. */
  function nearest(step) {
    const from = selected ? selected.row : Math.max(0, firstAbove(tops, view.scrollTop, 0, tops.length) - 1);
    const time = selected && selected.type === SPAN ? Math.max(lo, start[selected.i]) : lo;
    for (let row = from + step; row >= 0 && row < tops.length; row += step || 1) {
      const lane = lanesOf[row][0], i = lane ? spanAt(lane, time, Infinity) : -1;
      if (i >= 0) return { type: SPAN, row, lane, i };
    }
    return null;
  }

  // ---- moving

  /** Show the time from `from` to `to`, as far as there is any. */
  function look(from, to) {
    const span = Math.min(Math.max(to - from, Math.min(SHORTEST, END - BEGIN)), END - BEGIN);
    lo = Math.min(Math.max((from + to - span) / 2, BEGIN), END - span);
    hi = lo + span;
    draw();
  }

  const still = matchMedia("(prefers-reduced-motion: reduce)");

  /** The same on a short way there, so that the eye can follow. */
  function glide(from, to) {
    cancelAnimationFrame(gliding);
    if (still.matches) return look(from, to);
    const [fromLo, fromHi, began] = [lo, hi, performance.now()];
    const step = (now) => {
      const part = Math.min(1, Math.max(0, (now - began) / 140)), eased = 1 - (1 - part) ** 3;
      look(fromLo + (from - fromLo) * eased, fromHi + (to - fromHi) * eased);
      if (part < 1) gliding = requestAnimationFrame(step);
    };
    gliding = requestAnimationFrame(step);
  }

  /** The window that is `factor` times as wide around a moment that stays where it is; 0 is the whole call. */
  const zoomed = (factor, at) => (factor ? [at - (at - lo) * factor, at + (hi - at) * factor] : [BEGIN, END]);
  const middle = () => (lo + hi) / 2;
  const fit = ({ i }) => glide(start[i] - (end[i] - start[i]) * 0.05, end[i] + (end[i] - start[i]) * 0.05);

  const keys = {
    "+": () => glide(...zoomed(0.5, middle())), "=": () => glide(...zoomed(0.5, middle())),
    "-": () => glide(...zoomed(2, middle())), "0": () => glide(BEGIN, END),
    ArrowLeft: () => glide(lo - (hi - lo) / 5, hi - (hi - lo) / 5), ArrowRight: () => glide(lo + (hi - lo) / 5, hi + (hi - lo) / 5),
    ArrowUp: () => visit(nearest(selected ? -1 : 0)), ArrowDown: () => visit(nearest(selected ? 1 : 0)),
    n: () => visit(beside(1)), p: () => visit(beside(-1)),
    Enter: () => selected && selected.type === SPAN && fit(selected), Escape: () => select(null),
  };

  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && !selected && visit(nearest(0)));
  plot.addEventListener("blur", () => tip.matches(":hover") || select(null)); // Its text may be what is clicked.

  // The wheel alone scrolls the page, unless the timeline has the focus: nobody is caught in it on the way down.
  plot.addEventListener("wheel", (event) => {
    const pinch = event.ctrlKey || event.metaKey;
    if (!pinch && (event.shiftKey || document.activeElement !== plot)) return;
    event.preventDefault();
    cancelAnimationFrame(gliding);
    if (!pinned) select(null); // Something else comes to lie under the mouse.
    const perLine = event.deltaMode ? 16 : 1, sideways = (event.deltaX * perLine) / scale();
    const at = toTime(event.clientX - plot.getBoundingClientRect().left);
    const [from, to] = zoomed(1.0018 ** Math.max(-400, Math.min(400, event.deltaY * perLine * (pinch ? 2 : 1))), at);
    look(from + sideways, to + sideways);
  }, { passive: false });

  let drag = null;
  plot.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drag = { x: event.clientX, y: event.clientY, lo, hi, scroll: view.scrollTop, moved: false };
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    const frame = plot.getBoundingClientRect(), x = event.clientX - frame.left;
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved = drag.moved || Math.hypot(dx, dy) > 3;
      if (!drag.moved) return;
      plot.classList.add("dragged");
      cancelAnimationFrame(gliding);
      if (event.pointerType === "mouse") view.scrollTop = drag.scroll - dy;
      look(drag.lo - dx / scale(), drag.hi - dx / scale());
      if (!pinned) select(null);
      return;
    }
    $("cursor").hidden = false;
    $("cursor").style.left = `${x}px`;
    if (pinned) return;
    const target = hit(x, event.clientY - frame.top);
    select(target);
    if (target) showTip(target, event.clientX, event.clientY);
  });
  plot.addEventListener("pointerup", (event) => {
    const clicked = drag && !drag.moved;
    drag = null;
    plot.classList.remove("dragged");
    if (!clicked) return;
    // A click keeps the tip, so that its text can be selected; one beside it lets it go.
    const frame = plot.getBoundingClientRect(), target = hit(event.clientX - frame.left, event.clientY - frame.top);
    select(target, true);
    if (target) showTip(target, event.clientX, event.clientY);
  });
  plot.addEventListener("pointercancel", () => { drag = null; });
  plot.addEventListener("pointerleave", () => {
    $("cursor").hidden = true;
    if (!pinned && !drag) select(null);
  });
  plot.addEventListener("dblclick", () => selected && selected.type === SPAN && fit(selected));
  view.addEventListener("scroll", draw);

  // ---- around the plot

  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => glide(...zoomed(Number(button.dataset.zoom), middle())));
  }
  for (const button of document.querySelectorAll("[data-kind]")) {
    button.addEventListener("click", () => {
      const k = Number(button.dataset.kind), shown = hidden.delete(k);
      if (!shown) hidden.add(k);
      button.setAttribute("aria-pressed", String(shown));
      select(null);
      draw();
    });
  }

  const root = document.documentElement, prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);

  function setTheme(theme) {
    if (theme) root.dataset.theme = theme;
    else delete root.dataset.theme;
    readColours();
    drawNow();
  }

  /** Take the colours from what the style says of the legend and the page: resolved, in the theme of now. */
  function readColours() {
    const probe = document.body.appendChild(document.createElement("i"));
    const resolved = (name) => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    };
    for (const name of ["back", "raised", "idle", "line", "ink", "quiet"]) colour[name] = resolved(name);
    colour.kinds = kinds.map((_, k) => resolved(`kind-${k}`));
    colour.inks = colour.kinds.map((text) => (luminance(text) > 0.18 ? "#111" : "#fff"));
    probe.remove();
  }

  function luminance(text) {
    const [r, g, b] = text.match(/[\d.]+/g).map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  function measure() {
    const ratio = window.devicePixelRatio || 1, rows = [...$("rows").children];
    const origin = rows.length ? rows[0].offsetTop : 0;
    tops = rows.map((row) => row.offsetTop - origin);
    heights = rows.map((row) => row.offsetHeight);
    width = Math.max(1, plot.clientWidth);
    height = Math.max(AXIS, Math.min(view.clientHeight, AXIS + (rows.length ? tops[rows.length - 1] + heights[rows.length - 1] : 0)));
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.textBaseline = "middle";
    drawNow();
  }

  $("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  prefersDark.addEventListener("change", () => setTheme(root.dataset.theme));
  // Paper is white.
  let before;
  addEventListener("beforeprint", () => { before = root.dataset.theme; setTheme("light"); });
  addEventListener("afterprint", () => setTheme(before));

  const asked = /\btheme=(dark|light)\b/.exec(location.hash);
  if (asked) root.dataset.theme = asked[1];
  readColours();
  measure();
  new ResizeObserver(measure).observe(view);
  result.ready = true;
})();
