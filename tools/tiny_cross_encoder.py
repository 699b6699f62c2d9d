"""Build a tiny cross-encoder for tests: a BERT that scores (query, document) pairs.

No trained reranker can be downloaded where the tests run, so this one has random weights from a
fixed seed, and the vocabulary of all-MiniLM-L6-v2. Its scores mean nothing. What counts is that
vLLM treats it as the real thing (a sequence classifier with one label, hence a sigmoid score) and
that its scores tell pairs apart, which the last step checks.

Run by tools/vllm_server.py with the Python of `.venv-vllm`:

    python tools/tiny_cross_encoder.py MINILM_FOLDER OUTPUT_FOLDER
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

TOKENS = 256
LOGIT_SPREAD = 1.5  # standard deviation over the sample; the scores then cover 0.04 to 0.98
LEAST_SPREAD_OVER_DOCUMENTS = 0.15  # standard deviations of scores, for the worst query
LEAST_SPREAD_OVER_QUERIES = 0.05
QUERIES = [
    "how does Milvus store vectors",
    "who wrote the first programme",
    "cheap food near the station",
    "why is the sky blue",
]
DOCUMENTS = [
    "Milvus keeps each segment as an index file.",
    "Ada Lovelace published notes on the Analytical Engine.",
    "A noodle shop opens behind platform nine at six.",
    "Short waves of light scatter more than long ones.",
    "The cat sleeps on a warm radiator all winter.",
    "vLLM serves many requests from one batch.",
    "Rain is expected over the northern hills tonight.",
    "A cross-encoder reads the query and the document together.",
    "The museum is closed on Mondays.",
    "Bread rises because yeast makes carbon dioxide.",
    "Her train leaves Lyon at noon.",
    "An inverted index maps a word to the documents that hold it.",
    "Whales breathe air and sleep with half of the brain.",
    "The court rejected the appeal without comment.",
    "Copper conducts heat better than steel.",
    "He painted the door green and the fence white.",
    "Approximate search trades recall for speed.",
    "The recipe needs two eggs, flour and a little salt.",
    "Volcanic soil is rich in minerals.",
    "A goalkeeper may use the hands inside the area.",
]


def main() -> None:
    """Build the model, set its scale on the sample, check the scores and save everything."""
    minilm, output = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(minilm, model_max_length=TOKENS)
    model = build(len(tokenizer))
    calibrate(model, logits(model, tokenizer))
    check(logits(model, tokenizer).sigmoid())
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def build(vocabulary: int) -> BertForSequenceClassification:
    """Return the untrained model, its weights large enough that the two texts act on each other."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 numbers: vLLM on a CPU refuses 16
        intermediate_size=128,
        max_position_embeddings=TOKENS,
        initializer_range=0.3,
        num_labels=1,
    )
    return BertForSequenceClassification(config).eval()


@torch.no_grad()
def logits(model: BertForSequenceClassification, tokenizer: AutoTokenizer) -> torch.Tensor:
    """Score every query against every document: a (queries, documents) table of raw logits."""
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    inputs = tokenizer(pairs, padding=True, return_tensors="pt")
    return model(**inputs).logits.reshape(len(QUERIES), len(DOCUMENTS))


@torch.no_grad()
def calibrate(model: BertForSequenceClassification, raw: torch.Tensor) -> None:
    """Scale the last layer so that the sample's logits have mean 0 and the wanted spread."""
    scale = LOGIT_SPREAD / raw.std()
    model.classifier.weight.mul_(scale)
    model.classifier.bias.sub_(raw.mean()).mul_(scale)


def check(scores: torch.Tensor) -> None:
    """Stop with an error unless both texts of a pair matter, and each query orders anew."""
    over_documents = scores.std(dim=1).min().item()
    over_queries = scores.std(dim=0).min().item()
    orders = {tuple(row.argsort().tolist()) for row in scores}
    print(f"spread over documents {over_documents:.2f}, over queries {over_queries:.2f}")
    print(f"scores from {scores.min():.2f} to {scores.max():.2f}, {len(orders)} different orders")
    if (
        over_documents < LEAST_SPREAD_OVER_DOCUMENTS
        or over_queries < LEAST_SPREAD_OVER_QUERIES
        or len(orders) < len(QUERIES)
    ):
        raise SystemExit("the scores do not tell the pairs apart")


if __name__ == "__main__":
    main()
