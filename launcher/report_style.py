"""How does the report's page look? Its frame and style sheet, with nothing loaded from elsewhere."""

from string import Template

# $title and $sections are HTML already. The policy makes the browser refuse whatever is not in the page.
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title – sparse-zero report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f6f8fa; --card: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d9dee4;
  --good: #00664a; --bad: #a63b00; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9aa5b1; --line: #2f3742;
    --good: #4fd1a5; --bad: #ff9d66; --accent: #56b4e9;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; overflow-wrap: anywhere; }
h1 small { display: block; color: var(--muted); font-size: 0.95rem; font-weight: 400; }
h2 { margin: 0 0 1rem; font-size: 1.25rem; }
h3 { margin: 1.75rem 0 0.75rem; font-size: 1.05rem; }
h4 { margin: 0 0 0.4rem; font-size: 0.9rem; font-weight: 600; }
section { margin: 0 0 1.25rem; padding: 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 0.75rem;
  margin-bottom: 1.25rem; }
.tiles div { padding: 0.75rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
.tiles b { display: block; color: var(--accent); font-size: 1.5rem; line-height: 1.3; }
.tiles span { color: var(--muted); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.75rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
tbody th { width: 16rem; min-width: 9rem; color: var(--muted); font-weight: 400; }
.sheet th, .sheet td { overflow-wrap: normal; }
thead .number, td.number { text-align: right; padding-left: 0.75rem; }
td.number { white-space: nowrap; }
td.indented { padding-left: 1.25rem; }
tr.sum td { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
figure { margin: 0 0 1.5rem; }
figure:last-child { margin-bottom: 0; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: 0.4rem; color: var(--muted); font-size: 0.88rem; }
article { margin: 0 0 1rem; padding: 0.9rem 1rem; border: 1px solid var(--line); border-radius: 8px; }
article p { margin: 0 0 0.5rem; }
.problem { white-space: pre-wrap; overflow-wrap: anywhere; }
.expected { font-size: 0.92rem; }
.index, .note { color: var(--muted); }
.index { font-size: 0.82rem; margin-left: 0.5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0.75rem; }
.answer { min-width: 0; }
pre { margin: 0; padding: 0.6rem 0.75rem; background: var(--page); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.85rem/1.5 ui-monospace, monospace; }
.good { color: var(--good); }
.good::before { content: "✓ "; }
.bad { color: var(--bad); }
.bad::before { content: "✗ "; }
details { margin-bottom: 0.75rem; }
summary { cursor: pointer; font-weight: 600; }
@media print {
  body { background: none; }
  section { break-inside: auto; border: 0; padding: 0; }
  figure, article { break-inside: avoid; }
}
</style>
</head>
<body>
<main>
<h1>$title<small>sparse-zero report</small></h1>
$sections
</main>
</body>
</html>
""")
