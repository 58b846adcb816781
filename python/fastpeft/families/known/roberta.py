"""RoBERTa: BERT's classes under other names."""

from . import bert

PARTS = {name.replace("Bert", "Roberta"): part for name, part in bert.PARTS.items()}
