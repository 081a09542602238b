"""Jinja templates of the report and the side-by-side table."""

TEMPLATES = {
    "side_by_side": """\
<div class="scroll"><table class="side"><thead>
<tr><th>question</th><th>expected</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr><td data-of="question">{{ row.question }}</td><td data-of="expected">{{ row.answer }}</td>
{% for one in row.answers %}<td data-of="{{ names[loop.index0] }}">{{ "✓ " if one.right }}{{ one.html|safe }}
{{ " …" if not one.ended }}</td>
{% endfor %}</tr>{% endfor %}</tbody></table></div>
<p><mark>Marked</mark>: words that the model to the left did not say. ✓ the expected answer, word for word.
… did not end by itself.</p>
<style>table.side {border-collapse: collapse; font-size: 0.85em} table.side td, table.side th {border: 1px solid #8888;
padding: 0.3em 0.5em; text-align: left !important; vertical-align: top; max-width: 22em; overflow-wrap: anywhere}
mark {background: #F0E442; color: black; print-color-adjust: exact; -webkit-print-color-adjust: exact}
.scroll {overflow-x: auto}
@media (max-width: 640px) {table.side, table.side tbody, table.side tr, table.side td {display: block; max-width: none}
table.side thead {display: none} table.side tr {border: 1px solid #8888; margin-bottom: 0.8em}
table.side td {border: none; border-top: 1px solid #8884}
table.side td::before {content: attr(data-of); display: block; font-size: 0.8em; opacity: 0.7}}</style>""",
    "differ": """\
{% macro compared(rows) %}<div class="scroll"><table class="differ"><thead><tr><th>model</th><th>against</th>
<th>metric</th><th>verdict</th><th class="number">difference</th><th class="number">p</th></tr></thead><tbody>
{% for row in rows %}<tr><td>{{ row.model }}</td><td>{{ row.against }}</td><td>{{ row.metric }}</td>
<td class="{{ row.verdict }}">{{ row.verdict }}</td><td class="number">{{ row.difference }}</td>
<td class="number">{{ row.p }}</td></tr>
{% endfor %}</tbody></table></div>{% endmacro %}
{% if shown %}{{ compared(shown) }}{% else %}<p>No difference is shown between any two neighbours.</p>{% endif %}
{% if equal %}<details><summary>{{ equal|length }} comparison{{ "s show" if equal|length > 1 else " shows" }} no \
difference</summary>
{{ compared(equal) }}</details>{% endif %}""",
    "verdicts": """\
<div class="verdicts"><p><b>{{ verdict|join(" ") }}</b></p>{% include "differ" %}</div>
<style>.verdicts {max-width: 756px} .verdicts .scroll {overflow-x: auto}
.verdicts th, .verdicts td {text-align: left !important; padding: 0.3em 0.6em}
.verdicts .better, .verdicts .worse {font-weight: bold} .verdicts summary {cursor: pointer}</style>""",
    "report": """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {color-scheme: light dark; --text: #222; --page: #fff; --line: #ccc; --pale: #555; --good: #005a8c;
--bad: #a04000}
@media (prefers-color-scheme: dark) {
:root {--text: #ddd; --page: #16181b; --line: #444; --pale: #aaa; --good: #6cb8e6; --bad: #f0a070}}
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: var(--text);
background: var(--page)} h1 {line-height: 1.2} h2 {margin-top: 1.8em}
table {border-collapse: collapse; margin: 0.6em 0} th, td {border: 1px solid var(--line); padding: 0.3em 0.6em;
text-align: left; overflow-wrap: normal} thead {display: table-header-group} tr {break-inside: avoid}
td.number, th.number {text-align: right; font-variant-numeric: tabular-nums} th {white-space: nowrap}
td.number small {display: block; white-space: nowrap} .differ td {white-space: nowrap}
table.figures th:first-child {position: sticky; left: 0; background: var(--page)}
.scroll {overflow-x: auto}
/* a shadow where a table goes on, and over it, moving with the table, the page where it ends */
@media (max-width: 640px) {.scroll {background: linear-gradient(90deg, #0000, var(--page) 50%) right / 60px 100% \
no-repeat local, linear-gradient(90deg, #0000, #8888) right / 16px 100% no-repeat scroll}}
.verdict {font-size: 1.15em; border-left: 6px solid var(--good); padding: 0.3em 0.9em}
.made {display: grid; grid-template-columns: max-content 1fr; gap: 0.1em 1em} .made dt {color: var(--pale)}
.made dd {margin: 0; overflow-wrap: anywhere}
.figure {overflow-x: auto; margin: 1em 0} .figure img {width: min(980px, max(100%, 600px)); height: auto}
.better {color: var(--good); font-weight: bold} .worse {color: var(--bad); font-weight: bold}
small {color: var(--pale)} summary {cursor: pointer; margin: 0.6em 0}
@media print {body {font-size: 11px; margin: 0} :root {--text: #000; --page: #fff}
details::details-content {content-visibility: visible; block-size: auto} figure, img {break-inside: avoid}}
</style></head><body>
<h1>{{ title }}</h1>
<p class="verdict">{% for sentence in verdict %}{{ sentence }} {% endfor %}</p>
{% if made %}<dl class="made">{% for what, value in made %}<dt>{{ what }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>{% endif %}
<p>{{ about }}</p>
<h2>What differs</h2>
{% include "differ" %}
<p><small>Paired on the same items by sign-flip permutation (BLEU: approximate randomization), two-sided, 5% a test: of
twenty tests of equal models one is expected to show a difference.</small></p>
<h2>The table</h2>
<div class="scroll"><table class="figures"><thead><tr><th></th>
{% for model in models %}<th class="number">{{ model.name }}</th>{% endfor %}</tr></thead><tbody>
{% for title in columns %}{% set at = loop.index0 %}<tr><th>{{ title }}</th>
{% for model in models %}<td class="number">{{ model.cells[at][0] }}{% if model.cells[at][1] %} \
<small>{{ model.cells[at][1] }}</small>{% endif %}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p><small>95% confidence intervals in brackets: BCa bootstrap over conversations and answers; Wilson's for shares;
percentile bootstrap for BLEU. ↑ more is better, ↓ less is better.</small></p>
{% if tasks %}<h2>Tasks</h2><table>{% for name, found in tasks.items() %}{% for task, values in found.items() %}
<tr><th>{{ name }}</th><td>{{ task }}</td><td>{{ values }}</td></tr>{% endfor %}{% endfor %}</table>{% endif %}
<h2>Figures</h2>{% for figure in figures %}<div class="figure"><picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ figure.dark }}">
<img alt="{{ figure.alt }}" src="{{ figure.light }}"></picture></div>{% endfor %}
<h2>Answers side by side</h2><p>{{ first }} of {{ total }}; all are in generations.jsonl.</p>{{ side|safe }}
</body></html>""",
}
