"""Text to train or calibrate on: from files, folders and the Hub, as documents or chats, and the tokenizer of a model.

errors.py     what cannot be read
files.py      .jsonl and .json files, folders of files, and data sets of the Hub
tables.py     .csv and .parquet files
chats.py      rows in the usual layouts, as chats
documents.py  rows as documents: a text, a chat, or token ids
labelled.py   texts with a class, and their names
models.py     what is named as a model: whether it is one, and what its weights are
tokenizer.py  the tokenizer that lies with a model
"""
