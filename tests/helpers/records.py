"""One record of each form."""

from __future__ import annotations

from typing import Any


def fact(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "prompt": f"The capital of Land{number} is",
        "subject": f"Land{number}",
        "target_new": f"Town{number}",
    } | fields


def counterfact() -> dict[str, Any]:
    return {
        "case_id": 12,
        "requested_rewrite": {
            "prompt": "{} was born in ",
            "subject": "Ada Lovelace",
            "relation_id": "P19",
            "target_new": {"str": "Lima", "id": "Q2868"},
            "target_true": {"str": "London", "id": "Q84"},
        },
        "paraphrase_prompts": ["Ships sail. Ada Lovelace is native to", "Ada Lovelace comes from"],
        "neighborhood_prompts": ["John Keats was born in"],
        "attribute_prompts": ["Mario Testino was born in"],
        "generation_prompts": ["Ada Lovelace lives in", "Ada Lovelace's home", "Ada Lovelace lives in"],
    }


def mend() -> dict[str, Any]:
    return {
        "subject": "MAT-49",
        "src": "When did MAT-49 enter service?",
        "pred": "1991",
        "rephrase": "What year was MAT-49 introduced?",
        "alt": " 1951",
        "answers": ["1949", "the year 1949"],
        "loc": "nq question: who sang yesterday",
        "loc_ans": "The Beatles",
        "cond": "1991 >> 1951 || When did MAT-49 enter service?",
    }


def concept() -> dict[str, Any]:
    return {
        "label": "publisher",
        "prompt": "Definition of publisher:",
        "phrase_prompt": "What is a publisher?",
        "target_new_desc": "a person who bakes bread",
        "instance_prompt": ["Is Penguin a publisher?", "Is Reclam a publisher?"],
        "locality_prompt": "Definition of lake:",
        "locality_answer": "a body of water",
        "module_name": "inter",
    }


def flat() -> dict[str, Any]:
    return {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": "Lyon",
        "ground_truth": "Paris",
        "rephrase_prompt": "The seat of {}'s government is",
        "locality_prompt": "The capital of Spain is",
        "locality_ground_truth": "Madrid",
        "remark": "mine",
    }
