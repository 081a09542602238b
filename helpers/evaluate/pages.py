"""Jinja templates of the report and the side-by-side table."""

TEMPLATES = {
    "side_by_side": """\
<table class="side">
<tr><th>question</th><th>expected</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr><td>{{ row.question }}</td><td>{{ row.answer }}</td>
{% for one in row.answers %}<td>{{ "✓ " if one.right }}{{ one.html|safe }}{{ " …" if not one.ended }}</td>
{% endfor %}</tr>{% endfor %}</table>
<p><mark>Marked</mark>: words that the model to the left did not say. ✓ the expected answer, word for word.
… did not end by itself.</p>
<style>table.side {border-collapse: collapse; font-size: 0.85em} table.side td, table.side th {border: 1px solid #8888;
padding: 0.3em 0.5em; text-align: left; vertical-align: top; max-width: 22em; overflow-wrap: anywhere}
mark {background: #F0E442; color: black}</style>""",
    "report": """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>
<style>
body {font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto} th, td {border: 1px solid #ccc;
padding: 0.3em 0.6em; text-align: left} img {max-width: 100%; height: auto} .better {color: #005a8c; font-weight: bold}
.worse {color: #a04000; font-weight: bold} small {color: #555}
</style></head><body>
<h1>Evaluation</h1><p>{{ about }}</p>
<h2>The table</h2>
<table><tr><th></th>
{% for model in models %}<th>{{ model.name }}</th>{% endfor %}</tr>
{% for title in columns %}{% set at = loop.index0 %}<tr><th>{{ title }}</th>
{% for model in models %}<td>{{ model.cells[at] }}</td>{% endfor %}</tr>{% endfor %}</table>
<p><small>95% confidence intervals in brackets: BCa bootstrap over conversations and answers; Wilson's for shares;
percentile bootstrap for BLEU.</small></p>
<h2>Better, worse, or no difference shown</h2>
<table><tr><th>model</th><th>against</th><th>metric</th><th>verdict</th><th>difference</th><th>p</th></tr>
{% for row in comparisons %}<tr><td>{{ row.model }}</td><td>{{ row.against }}</td><td>{{ row.metric }}</td>
<td class="{{ row.verdict }}">{{ row.verdict }}</td><td>{{ row.difference }}</td><td>{{ row.p }}</td></tr>
{% endfor %}</table>
<p><small>Paired on the same items by sign-flip permutation (BLEU: approximate randomization), two-sided, 5% a test:
of twenty tests of equal models one is expected to show a difference.</small></p>
{% if tasks %}<h2>Tasks</h2><table>{% for name, found in tasks.items() %}{% for task, values in found.items() %}
<tr><th>{{ name }}</th><td>{{ task }}</td><td>{{ values }}</td></tr>{% endfor %}{% endfor %}</table>{% endif %}
<h2>Figures</h2>{% for name, source in figures.items() %}<p><img alt="{{ name }}" src="{{ source }}"></p>{% endfor %}
<h2>Answers side by side</h2><p>The first of {{ total }}; all are in generations.jsonl.</p>{{ side|safe }}
</body></html>""",
}
