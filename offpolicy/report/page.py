"""The page of a report: sections put together as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from offpolicy.report.figures import Drawn
from offpolicy.report.writing import Markup, tag

CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--paper:#fff;--line:#d0d7de;--shade:#f6f8fa;--link:#0550ae}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9da7b1;--paper:#0d1117;--line:#30363d;--shade:#161b22;
--link:#79c0ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper);overflow-wrap:anywhere}
a{color:var(--link)}h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
.wide{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;overflow-wrap:normal}
thead th{background:var(--shade);position:sticky;top:0}thead th button{all:unset;cursor:pointer;font-weight:600}
thead th button:focus-visible{outline:2px solid var(--link)}
td,tbody th{white-space:nowrap}td.long{white-space:normal;min-width:18rem}
.unknown{color:var(--soft);background:var(--shade);font-style:italic}
ul.notes li{margin:.2rem 0}nav ul{columns:2 16rem}
figure{margin:1.5rem 0}figure .wide>svg{width:100%;min-width:30rem;height:auto;display:block}
svg text{fill:currentColor}figcaption,.soft{color:var(--soft);font-size:.9rem}
pre{background:var(--shade);padding:.6rem;overflow-x:auto;white-space:pre-wrap}
@media (max-width:40rem){body{font-size:15px;padding:.6rem}nav ul{columns:1}
tbody th{white-space:normal;overflow-wrap:anywhere;min-width:7rem}}
@media print{nav,button{display:none}details{display:block}body{max-width:none}}
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, i) => {
    const button = document.createElement("button");
    button.textContent = head.textContent; head.replaceChildren(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      const key = row => { const cell = row.cells[i]; return cell ? cell.dataset.key ?? cell.textContent : ""; };
      const order = (a, b) => {
        const x = parseFloat(key(a)), y = parseFloat(key(b));
        return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || key(a).localeCompare(key(b)) : x - y;
      };
      const rows = [...body.rows].sort(order);
      if (!up) rows.reverse();
      table.querySelectorAll("th[aria-sort]").forEach(one => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...rows);
    };
  });
}
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        name: of its anchor.
        title: of its heading.
        parts: its markup, in order; none leaves the section out.
    """

    name: str
    title: str
    parts: list[Markup] = field(default_factory=list)


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    shown = [one for one in sections if one.parts]
    contents = tag("ul", *(tag("li", tag("a", one.title, href=f"#{one.name}")) for one in shown))
    body = [tag("section", tag("h2", one.title), *one.parts, id=one.name) for one in shown]
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    whole = tag(
        "body",
        tag("h1", title),
        tag("nav", contents, aria_label="Contents"),
        tag("main", *body),
        tag("script", Markup(SCRIPT)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">{head}\n{whole}</html>\n'


def notes(sentences: Sequence[str]) -> list[Markup]:
    """Sentences as a list; nothing for none."""
    return [tag("ul", *(tag("li", one) for one in sentences), class_="notes")] if sentences else []


def shown_figure(drawn: Drawn, words: str = "") -> Markup:
    """A figure with what it shows and where its files are."""
    kinds = ("png", "pdf") if drawn.files else ()
    files = [part for kind in kinds for part in (" ", tag("a", kind.upper(), href=f"figures/{drawn.name}.{kind}"))]
    told = tag("figcaption", words or drawn.words, *files)
    return tag("figure", tag("div", Markup(drawn.svg), class_="wide"), told)


def folded(title: str, *parts: Markup) -> Markup:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", title), *parts)


def unknown(reason: str) -> Markup:
    """A cell of something that is not known, with the reason."""
    return tag("span", f"not known: {reason}", class_="unknown")
