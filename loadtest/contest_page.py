"""The template of a comparison's HTML page: one file, nothing fetched, light and dark. Knows no figures."""

CONTEST_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ record.left.model }} against {{ record.right.model }}, {{ started }}</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2127; --soft: #5d6873; --line: #dfe3e8; --panel: #f6f8fa;
        --left: #2f6fc9; --right: #c2661c; --tie: #9aa5b1; --bad: #b3261e; --bad-paper: #fdecea; --note-paper: #fff7e0;
        --note-line: #d9a400; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --ink: #e4e8ec; --soft: #9aa5b1; --line: #2d343c; --panel: #1c2127; --left: #6aa5f5;
          --right: #f0a05c; --tie: #5d6873; --bad: #ff8a80; --bad-paper: #3a1a18; --note-paper: #2c2614;
          --note-line: #b58900; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 1280px; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0 0 .2rem; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
h2 small { font-weight: 400; color: var(--soft); }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.left { color: var(--left); }
.right { color: var(--right); }
.lead { margin: 1rem 0; padding-left: 1.2rem; font-size: 1.05rem; }
.banner { margin: 1rem 0; padding: .7rem 1rem; border-left: 4px solid var(--bad); background: var(--bad-paper); }
.notes { margin: 1rem 0; padding: .5rem 1rem; border-left: 4px solid var(--note-line); background: var(--note-paper); }
.notes ul { margin: .2rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; line-height: 1.3; }
th:first-child, td:first-child { text-align: left; font-weight: 600; }
.bar { display: flex; height: 1.5rem; margin: .8rem 0 .3rem; border-radius: 4px; overflow: hidden; font-size: .8rem; }
.bar span { display: grid; place-items: center; min-width: 1.4rem; color: #ffffff; }
.bar .left { background: #2f6fc9; } .bar .right { background: #c2661c; } .bar .tie { background: #77828e; }
nav { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; padding: .6rem 0;
      background: var(--paper); border-bottom: 1px solid var(--line); }
button, select, input { font: inherit; color: inherit; padding: .2rem .7rem; border: 1px solid var(--line);
      border-radius: 6px; background: var(--panel); }
button { cursor: pointer; }
button[aria-pressed=true] { border-color: var(--ink); font-weight: 600; }
article { margin: 1rem 0; padding: .8rem 1rem; background: var(--panel); border-radius: 8px; }
article header { display: flex; justify-content: space-between; gap: 1rem; font-size: .82rem; color: var(--soft); }
article pre { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/1.45 ui-monospace,
      "Cascadia Mono", "Liberation Mono", Menlo, monospace; max-height: 22rem; overflow-y: auto; }
.prompt { color: var(--soft); }
.pair { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: .8rem; }
.pair > div { padding: .5rem .7rem; background: var(--paper); border-radius: 6px; border-top: 3px solid var(--line);
              min-width: 0; }
.pair h3 { display: flex; justify-content: space-between; margin: 0; font-size: .82rem; overflow-wrap: anywhere; }
.pair .won { border-top-color: currentColor; }
.pair > div > pre { color: var(--ink); }
.facts { font-size: .78rem; color: var(--soft); }
.error { color: var(--bad); font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em/1.4 ui-monospace, "Cascadia Mono", "Liberation Mono", Menlo, monospace; overflow-wrap: anywhere; }
@media (max-width: 800px) { .pair { grid-template-columns: 1fr; } }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1><span class="left">{{ record.left.model }}</span> against <span class="right">{{ record.right.model }}</span></h1>
<p class="soft">{{ started }} · the same held-out examples to both, streaming, through one client,
{{ record.concurrency }} at a time</p>
{% if record.stopped %}<div class="banner"><strong>Not everything was asked.</strong> {{ record.stopped }}
The same command goes on where this ended.</div>{% endif %}
{% if verdicts %}<ul class="lead">{% for words in verdicts %}<li>{{ words }}</li>{% endfor %}</ul>{% endif %}
{% if record.notes %}<div class="notes"><ul>{% for text in record.notes %}<li>{{ text }}</li>{% endfor %}</ul></div>
{% endif %}

{% for task in tasks %}
<h2>{{ task.name }} <small>{{ task.metric }}, {{ task.contest.answered_by_both }} of {{ task.contest.examples }} examples
answered by both</small></h2>
<div class="scroll"><table>
<thead><tr><th></th><th>model</th><th>answers</th><th>failed</th><th>quality</th><th>TTFT p50, ms</th><th>p90</th>
<th>total p50, ms</th><th>p90</th><th>tok/s a stream</th><th>tokens in</th><th>out</th><th>$ per 1,000</th></tr></thead>
<tbody>{% for side in task.sides %}<tr><td class="{{ side.name }}">{{ side.name }}</td>
{%- for cell in side.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if task.bar %}<div class="bar" role="img" aria-label="wins, ties and losses">
{%- for kind, count, width in task.bar %}<span class="{{ kind }}" style="width: {{ width }}"
 title="{{ kind }}: {{ count }}">{{ count }}</span>{% endfor %}</div>{% endif %}
<p class="soft">Left better {{ task.contest.wins }}, tie {{ task.contest.ties }}, right better {{ task.contest.losses }}
(by chance: {{ task.chance }}). Difference, left minus right: {{ task.difference }}.
{% if task.majority %}Always the most frequent label: {{ task.majority }}. {% endif %}
{% if task.references %}The paper's prompted scores on the task of this name: {{ task.references | join(", ") }};
its prompts and rows were not these.{% endif %}</p>
{% endfor %}

<h2 id="examples">Outputs</h2>
<nav><span class="soft">Show</span>
<button data-show="all" aria-pressed="true">all</button><button data-show="left">left better</button>
<button data-show="tie">ties</button><button data-show="right">right better</button>
<button data-show="missing">unanswered</button>
{% if tasks | length > 1 %}<select aria-label="task"><option value="">every task</option>
{% for task in tasks %}<option>{{ task.name }}</option>{% endfor %}</select>{% endif %}
<input type="search" placeholder="find text" aria-label="find text"> <span class="soft" id="count"></span></nav>
{% for example in examples %}<article data-winner="{{ example.winner }}" data-task="{{ example.task }}">
<header><span>{{ example.task }} · {{ example.id }}</span>
<span>{{ example.said }}</span></header>
<pre class="prompt">{{ example.prompt }}</pre>
<div class="pair">
{% for answer in example.answers %}{% set name = ("left", "right")[loop.index0] %}
<div class="{{ name }}{% if example.winner == name %} won{% endif %}"><h3><span>{{ record[name].model }}</span>
<span>{{ answer.score }}</span></h3>{% if answer.error %}<p class="error">{{ answer.error }}</p>{% endif %}
<pre>{{ answer.text }}</pre><p class="facts">{{ answer.facts }}</p></div>{% endfor %}
<div><h3><span class="soft">wanted</span></h3><pre>{{ example.target }}</pre></div>
</div></article>
{% endfor %}

<h2>What was run</h2>
<dl><dt>command</dt><dd><code>{{ record.command }}</code></dd>
{% for name, side in sides %}<dt class="{{ name }}">{{ name }}</dt><dd>{{ side.model }} at {{ side.url }};
{{ side.price }};
{% for field, value in side.request.items() %}{{ field }} {{ value }}{% if not loop.last %}, {% endif %}{% endfor %}</dd>
{% endfor %}
<dt>spent</dt><dd>${{ "%.4f" | format(record.spent) }} by token prices, of ${{ record.cap }} allowed</dd>
<dt>asked from</dt><dd>{{ record.machine.cpu }}, {{ record.machine.cores }} cores, {{ record.machine.system }}</dd>
<dt>versions</dt><dd>{% for name, version in record.machine.versions.items() %}{{ name }} {{ version }}
{%- if not loop.last %}, {% endif %}{% endfor %}</dd>
</dl>

<h2>Definitions</h2>
<dl>{% for name, meaning in definitions.items() %}<dt>{{ name }}</dt><dd>{{ meaning }}</dd>{% endfor %}</dl>
<script>
const articles = [...document.querySelectorAll("article")];
const buttons = [...document.querySelectorAll("nav button")];
const select = document.querySelector("nav select"), search = document.querySelector("nav input");
function show() {
  const kind = buttons.find(button => button.getAttribute("aria-pressed") === "true").dataset.show;
  const words = search.value.toLowerCase();
  let shown = 0;
  for (const article of articles) {
    const fits = (kind === "all" || article.dataset.winner === kind) &&
      (!select || !select.value || article.dataset.task === select.value) &&
      (!words || article.textContent.toLowerCase().includes(words));
    article.hidden = !fits;
    shown += fits;
  }
  document.getElementById("count").textContent = `${shown} of ${articles.length}`;
}
for (const button of buttons) button.onclick = () => {
  for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
  show();
};
if (select) select.onchange = show;
search.oninput = show;
show();
</script>
</body>
</html>
"""
