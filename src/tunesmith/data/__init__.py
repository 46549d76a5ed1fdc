"""Data files to packed token batches. A row passes through these files, in this order:

    file      readers/local_file.py      check the path, unpack .gz and .parquet
    rows      readers/sources.py         open a file as rows (readers/text_folder.py: a folder)
              readers/row_index.py       locate each row: line, CSV record, array element
              readers/decode.py          decode the bytes of one row, strictly
    example   formats/parse.py           detect the format, parse a row
              formats/messages.py        validate and convert its messages
              formats/prompt_templates.py, few_shot.py    build the prompt from columns
              constraints.py             exclude or mark answers that break a `never` constraint
    dataset   dataset.py                 all rows of one role; invalid rows are recorded
    document  chat_template/             render the messages, and mark what is supervised
              tokenizer/                 encode the text
              truncation.py              apply max_length
    step      sampler.py                 choose the rows of each step, mix tasks
              pretraining.py             windows of long texts, instead of rows
              rehearsal.py               add general rows
    pack      packing.py                 pack the documents of a step
              prefix_sharing.py          compute common prefixes once
    batch     collate.py                 tensors; the only file here that imports torch

From there train/loop.py takes a batch to the loss. The other files work on whole data sets: checks/
(audit), length_stats.py, rejects.py, split.py, selection.py, hashing.py, golden_set.py,
preview.py."""
