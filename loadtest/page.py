"""The template of the HTML page: one file, nothing fetched, for light and dark screens. Knows no figures."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Load test of {{ plan.model }}, {{ started }}</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2127; --soft: #5d6873; --line: #dfe3e8; --panel: #f6f8fa;
        --bad: #b3261e; --bad-paper: #fdecea; --note-paper: #fff7e0; --note-line: #d9a400; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e8ec; --soft: #9aa5b1; --line: #2d343c; --panel: #1c2127;
          --bad: #ff8a80; --bad-paper: #3a1a18; --note-paper: #2c2614; --note-line: #b58900; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1280px; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.4rem 0 .7rem; font-size: 1.15rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.lead { margin: 1.1rem 0; font-size: 1.1rem; }
.banner { margin: 1rem 0; padding: .7rem 1rem; border-left: 4px solid var(--bad); background: var(--bad-paper); }
.banner strong { color: var(--bad); }
.notes { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid var(--note-line); background: var(--note-paper); }
.banner ul, .notes ul { margin: .2rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; line-height: 1.3; }
thead tr + tr th:first-child { text-align: right; }
thead tr:first-child th[colspan] { text-align: center; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.first td { border-top: 2px solid var(--line); }
td.bad { color: var(--bad); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .3rem 0 .6rem; color: var(--soft); }
.legend i { display: inline-block; width: 1.5rem; height: 0; margin-right: .45rem; border-top: 3px solid;
            vertical-align: middle; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 1rem; }
.plots figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: 8px; }
.plots svg { display: block; width: 100%; height: auto; }
.plots text { font-family: inherit !important; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em/1.4 ui-monospace, "Cascadia Mono", "Liberation Mono", Menlo, monospace; }
code span { white-space: nowrap; }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1>Load test of {{ plan.model }}</h1>
<p class="soft">{{ started }} · {{ plan.base_url }} ·
{% if plan.experiment %}experiment {{ plan.experiment }} ·{% endif %}
{% if plan.stages[0].rate %}open loop: requests are sent by a schedule ({{ plan.arrivals }}), times are from it{% else %}
closed loop: a user sends its next request when its last answer is complete
{%- if plan.think_seconds %}, after {{ plan.think_seconds }} s of thought{% endif %}{% endif %}</p>
{% if headline %}<p class="lead">{{ headline }}</p>{% endif %}
{% if invalid %}<div class="banner"><strong>Do not rely on every figure here.</strong><ul>
{% for text in invalid %}<li>{{ text }}</li>{% endfor %}</ul></div>{% endif %}
{% if notes %}<div class="notes"><ul>{% for text in notes %}<li>{{ text }}</li>{% endfor %}</ul></div>{% endif %}

<h2>Results</h2>
<div class="scroll"><table>
<thead>
<tr><th rowspan="2">adapters</th><th rowspan="2">users</th><th rowspan="2">requests</th><th rowspan="2">failed</th>
<th colspan="2">total request time, ms</th><th colspan="2">TTFT, ms</th><th colspan="2">token streaming, ms</th>
<th colspan="2">output tok/s</th><th colspan="2">against base</th></tr>
<tr><th>average</th><th>p90</th><th>average</th><th>p90</th><th>average</th><th>p90</th><th>per stream</th><th>in all</th>
<th>total time</th><th>tok/s</th></tr>
</thead>
<tbody>
{% for row in results %}<tr{% if row.first %} class="first"{% endif %}><td>{{ row.mode }}</td>
{%- for cell in row.cells %}<td{% if loop.index0 == 2 and row.failed %} class="bad"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="soft">{{ table_note }}</p>

<h2>Plots</h2>
<div class="legend">{% for mode, colour in legend %}<span><i style="border-color: {{ colour }}"></i>{{ mode }}</span>
{% endfor %}<span>solid: average · dashed: p90</span></div>
<div class="plots">{% for plot in plots %}<figure>{{ plot | safe }}</figure>{% endfor %}</div>

<h2>More of each stage</h2>
<div class="scroll"><table>
<thead><tr><th>stage</th>{% for name in more_columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in more %}<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>

<h2>How sure they are</h2>
<p class="soft">Percentiles with their 95 % intervals from order statistics, ms;
– where the samples do not bound an end.</p>
<div class="scroll"><table>
<thead><tr><th>stage</th><th>TTFT p50</th><th>TTFT p90</th><th>TTFT p99</th><th>total p50</th><th>total p90</th>
<th>total p99</th></tr></thead>
<tbody>{% for name, cells in sure %}<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>

<h2>The paper's figures</h2>
<p class="soft">LoRA Land, Mistral-7B on one A100: another model on other hardware, and nobody
checked these against its text.</p>
<dl>{% for line in paper %}<dt>{{ line.what }}</dt><dd>{{ line.figure }}
<span class="soft">({{ line.source }})</span></dd>
{% endfor %}</dl>

<h2>Models</h2>
<p class="soft">All stages pooled. Cold: the run's first request to the model, loading included; it is in no other
figure.</p>
<div class="scroll"><table>
<thead><tr><th>model</th><th>requests</th><th>failed</th><th>cold TTFT, ms</th><th>TTFT average, ms</th>
<th>TTFT p90, ms</th>
<th>total average, ms</th><th>output tokens</th></tr></thead>
<tbody>{% for name, cells in models %}<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>

<h2>Self-check</h2>
<p class="soft">The load process watches itself: past {{ cpu_limit }} of a core, or woken later than {{ lag_limit }}
of the TTFT, it would be measuring itself: give it a free core or another machine.
Locust counts and times each request too, over whole stages.</p>
<div class="scroll"><table>
<thead><tr><th>stage</th><th>client CPU, of a core</th><th>loop lag p50, ms</th><th>p99, ms</th><th>max, ms</th>
<th>users asked for</th><th>in flight, average</th><th>Locust's requests</th><th>Locust's average, ms</th></tr></thead>
<tbody>{% for name, cells, bad in checks %}<tr><td{% if bad %} class="bad"{% endif %}>{{ name }}</td>
{%- for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>

<h2>What was run</h2>
<dl>{% for name, value in facts %}<dt>{{ name }}</dt><dd>{% if name == "command" %}<code>
{%- for word in value.split(" ") %}<span>{{ word }}</span> {% endfor %}</code>{% else %}
{{- value }}{% endif %}</dd>{% endfor %}</dl>

<h2>Definitions</h2>
<dl>{% for name, meaning in definitions.items() %}<dt>{{ name }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
</body>
</html>
"""
