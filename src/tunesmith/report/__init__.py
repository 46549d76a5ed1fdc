"""A run folder as one page: `report.html`, which needs nothing beside it and opens from disk.

    read_story(path) -> Story -> page(story) -> HTML

    story.py     what the folder holds, of one run or of several stages
    verdict.py   what changed, is it real, what it cost
    results.py   before and after, gain against forgetting
    curves.py    losses and scores over the steps, and what happened on the way
    samples.py   answers side by side
    facts.py     data, plan, cost, how to reproduce, provenance
    page.py      the whole page; page.css and page.js go into it
    markup.py    HTML that cannot be broken by what it holds; chart.py and diff.py draw and compare

It reads run folders and nothing else, and nothing depends on it: a run is the same without it.
"""
