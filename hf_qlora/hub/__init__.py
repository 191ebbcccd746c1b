"""Sharing: the push, what Trainer pushes, and the model card.

errors      what the Hub's client raises, with the repository and the way out
card        the two blocks of a README.md, and what stays of the rest
facts       what a model says about itself
licenses    the licences of models, as cards and the Hub state them
quantized   the card of a base in NF4
merged      the card of a merged model
callback    what a Trainer has measured
push        `push_to_hub` of models and configs
trainer     what Trainer pushes by itself
"""
