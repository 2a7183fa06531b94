"""The style sheet of the report page."""

from launch.report.figures import BLUE, COLOURS, ORANGE, RAMP

_SWATCHES = "".join(
    f".c{index}{{border-top-color:{colour}}}" for index, colour in enumerate(COLOURS)
)

STYLE_SHEET = f"""
:root{{--ink:#1f2933;--soft:#5b6772;--line:#dfe4e8;--back:#f6f8f9;--card:#fff;--good:#2c7a51;
--open:#9a5b13}}
@media (prefers-color-scheme:dark){{:root{{--ink:#e6eaed;--soft:#a3aeb8;--line:#333d46;
--back:#14191d;--card:#1c2328;--good:#6fc397;--open:#e0a458}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif}}
main{{max-width:74rem;margin:0 auto;padding:1.5rem 1rem 3rem}}
header,section{{background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:1.1rem 1.25rem;margin:0 0 1rem}}
h1{{font-size:1.35rem;line-height:1.3;margin:0;overflow-wrap:anywhere}}
h2{{font-size:1.05rem;margin:0 0 .3rem}}
p{{margin:.2rem 0 .8rem;color:var(--soft);max-width:48rem;font-size:.92rem}}
.path{{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.8rem;overflow-wrap:anywhere}}
.note{{border-left:3px solid var(--open);padding-left:.7rem;margin-top:.8rem}}
.state{{font-size:.78rem;font-weight:600;border:1px solid;border-radius:1rem;padding:.1rem .6rem;
vertical-align:.15em;white-space:nowrap}}
.done{{color:var(--good)}}
.open{{color:var(--open)}}
.figures{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,13rem),1fr));
gap:.9rem 1.5rem;margin:.9rem 0 0}}
dt{{font-size:.8rem;color:var(--soft)}}
dd{{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}}
dd small{{display:block;font-weight:400;font-size:.8rem;color:var(--soft)}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.28rem .9rem .28rem 0;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}}
th:first-child{{text-align:left}}
thead th{{color:var(--soft);font-weight:600;font-size:.8rem}}
tbody th{{font-weight:500}}
.settings td{{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;
font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.8rem}}
.settings th{{vertical-align:top}}
details{{margin-top:.8rem}}
section>details:first-child{{margin:0}}
summary{{cursor:pointer;font-weight:600;font-size:.92rem}}
.pictures{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15.5rem),1fr));
gap:1.1rem;align-items:start}}
.wide{{grid-template-columns:repeat(auto-fill,minmax(min(100%,26rem),1fr))}}
figure{{margin:0}}
figcaption{{font-size:.85rem;font-weight:600;margin-bottom:.25rem}}
img{{display:block;width:100%;max-width:23rem;height:auto;background:#fff;border-radius:.3rem}}
.wide img{{max-width:34rem}}
.legend{{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;list-style:none;padding:0;margin:0 0 .8rem;
font-size:.85rem;color:var(--soft)}}
.swatch{{display:inline-block;width:1.5rem;height:0;margin-right:.45rem;vertical-align:.28em;
border-top:3px solid transparent}}
{_SWATCHES}
.dashed{{border-top-style:dashed}}
.target{{border-top:2px dashed {ORANGE}}}
.band{{height:.7rem;border:0;background:{BLUE};opacity:.25;vertical-align:-.05em}}
.held{{border-top-color:{ORANGE}}}
.source{{border-top:2px dotted var(--soft)}}
.ramp{{height:.7rem;width:5rem;border:1px solid var(--line);vertical-align:-.08em;
background:linear-gradient(90deg,{RAMP[0]},{RAMP[1]},{RAMP[2]})}}
footer{{color:var(--soft);font-size:.8rem;padding:.3rem .2rem}}
@media (max-width:34rem){{main{{padding:.6rem .5rem 2rem}}header,section{{padding:.9rem .8rem}}
.figures{{grid-template-columns:1fr 1fr;gap:.8rem}}
table{{font-size:.78rem}}thead th{{font-size:.72rem;white-space:normal;vertical-align:bottom}}
th,td{{padding-right:.55rem}}}}
@media print{{body{{background:#fff}}section,header{{break-inside:avoid}}}}
"""
