"""Write a run folder as one page: `report.html`, which opens from disk and loads nothing.

    load_report_data(path) -> ReportData -> render_page(run_data) -> HTML

    run_data.py          what the folder holds, of one run or of several stages
    summary.py           the verdict: what changed, whether it is real, what it cost
    results.py           before and after, adapter-scale trade-off
    training_curves.py   losses and scores over the steps, warnings
    samples.py           answers before and after
    details.py           data, cost, reproduction, provenance
    page.py              the whole page, from templates/, page.css and page.js
    html.py              the Jinja environment; svg_charts.py lays out charts
    trackers.py          TensorBoard and Weights & Biases

It reads run folders only, and nothing depends on it: a run is the same without it.
"""
