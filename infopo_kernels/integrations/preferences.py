"""The one way from preference text to features: check rows, tokenise, cut, leave out pairs with nothing to compare.

A feature is a pair as token ids, a dictionary in the names of TRL, which the collators take:

    prompt_ids      list[int]
    chosen_ids      list[int], the response
    rejected_ids    list[int], or list[list[int]] for several rejected responses
    chosen_mask, rejected_mask              as deep as the ids; 1 = scored, 0 = not; missing: all are scored
    weight          float; missing: 1
    ref_chosen_logps, ref_rejected_logps    nats; float (or None for a chosen one that was skipped), or list[float]
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from infopo_kernels.integrations.chat_turns import (
    SCORE_TURNS,
    Renderer,
    check_prompt_is_kept,
    common_prefix,
    scored_mask,
)
from infopo_kernels.integrations.model_limits import check_features
from infopo_kernels.integrations.preference_rows import (
    Preference,
    PreferenceError,
    PreferenceWarning,
    parse_preference,
    read_preferences,
    report_bad_rows,
)

__all__ = [
    "SCORE_TURNS",
    "Feature",
    "Preference",
    "PreferenceError",
    "PreferenceWarning",
    "by_feature",
    "check_features",
    "cut",
    "encode",
    "feature_dataset",
    "lists_rejected",
    "nothing_to_score",
    "parse_preference",
    "preference_features",
    "read_preferences",
    "rejected_responses",
    "scorable",
]

Feature: TypeAlias = dict[str, Any]


def encode(tokenizer: Any, pair: Preference, *, score_turns: str = "all") -> Feature:
    """Token ids of one pair, tokenised as TRL's `DPOTrainer` does.

    Prompt and response are tokenised together. The response begins where the prompt's own tokens end, or earlier if the
    two differ before: tokens merge across the boundary, or the chat template renders the prompt alone differently. A
    `PreferenceWarning` says so then. Standard responses get an end-of-sequence token.

    Args:
        tokenizer: a tokenizer of transformers, or a processor with one.
        pair: from `parse_preference` or `read_preferences`.
        score_turns: "all": every token after the prompt is scored, as in TRL's DPO, so that results compare; except
            tokens of messages with ``"weight": 0``. "assistant": in a response of several turns, only the assistant's
            words (TRL's `assistant_only_loss` in its SFT), since user and tool turns are not the model's words.

    Returns:
        The feature. Its masks are there if `score_turns` is "assistant" or a message has a weight.

    Raises:
        PreferenceError: a conversation, but the tokenizer has no chat template, or the template refuses it, or changes
            the last turn of the prompt when a reply follows; turns cannot be told apart.
        ValueError: `score_turns` is neither.
    """
    feature, lost = _encode(tokenizer, pair, score_turns)
    _warn_of_lost_prompts([(pair.where, lost)] if lost else [], 1)
    return feature


def _encode(tokenizer: Any, pair: Preference, score_turns: str) -> tuple[Feature, str]:
    """The feature, and the end of the prompt's own text that is not part of it (usually empty)."""
    if score_turns not in SCORE_TURNS:
        raise ValueError(f"`score_turns` must be one of {', '.join(map(repr, SCORE_TURNS))}, got {score_turns!r}.")
    responses = [pair.chosen, *pair.rejected_responses]
    conversations: list[Any] = []
    render: Renderer | None = None
    if pair.conversational:
        render = Renderer(tokenizer, pair)
        conversations = [[*pair.prompt, *response] for response in responses]
        prompt, *wholes = [render.ids(pair.prompt, reply=True), *map(render.ids, conversations)]  # type: ignore[arg-type]
    else:
        inner = getattr(tokenizer, "tokenizer", tokenizer)
        end = inner.eos_token or ""
        texts = [pair.prompt + (r if r.endswith(end) else r + end) for r in responses]  # type: ignore[operator, union-attr]
        prompt, *wholes = [list(inner(text)["input_ids"]) for text in (pair.prompt, *texts)]
    start = min(common_prefix(prompt, whole) for whole in wholes)
    lost = ""
    if start < len(prompt):
        if render is not None:
            check_prompt_is_kept(render, pair, conversations)
        # A tokenizer may put an end token after every string; losing that one does no harm.
        lost = str(tokenizer.decode(prompt[start:], skip_special_tokens=render is None))
    chosen, *rejected = [whole[start:] for whole in wholes]
    feature: Feature = {
        "prompt_ids": prompt[:start],
        "chosen_ids": chosen,
        "rejected_ids": rejected if pair.several else rejected[0],
    }
    if render is not None and (score_turns != "all" or _has_turn_weights(responses)):
        names = ["chosen", *([f"rejected[{k}]" for k in range(len(rejected))] if pair.several else ["rejected"])]
        chosen_mask, *rejected_mask = [
            scored_mask(render, pair, name, response, whole, start, score_turns)
            for name, response, whole in zip(names, responses, wholes, strict=True)
        ]
        feature["chosen_mask"] = chosen_mask
        feature["rejected_mask"] = rejected_mask if pair.several else rejected_mask[0]
    if pair.weight is not None:
        feature["weight"] = pair.weight
    return feature | pair.references, lost


def _has_turn_weights(responses: Sequence[Any]) -> bool:
    return any("weight" in turn for response in responses for turn in response)


def _warn_of_lost_prompts(lost: Sequence[tuple[str, str]], pairs: int) -> None:
    """`lost`: row and lost text of each pair whose feature lacks the end of the prompt."""
    if lost:
        where, text = lost[0]
        warnings.warn(
            f"{len(lost)} of {pairs} pairs: the prompt tokenised alone is not what prompt and response begin with"
            f" (first: {where or 'row 0'}, where {text!r} at the end of the prompt is left out). The response is"
            f" trained in another context than it will have in use. Either the chat template renders a prompt otherwise"
            f" when a reply follows: use one that does not. Or tokens merge at the boundary: end the prompt on one.",
            PreferenceWarning,
            stacklevel=3,
        )


def rejected_responses(feature: Feature, name: str = "rejected_ids") -> list[Any]:
    """`feature[name]`, a field of the rejected responses, as a list of one entry a response, also for a single one."""
    values = feature[name]
    return list(values) if lists_rejected(feature) else [values]


def by_feature(features: Iterable[Feature], values: Iterable[float]) -> list[list[float]]:
    """The values of all rejected responses of a batch, in its order, as one list for each feature."""
    rest = iter(values)
    return [[next(rest) for _ in rejected_responses(feature)] for feature in features]


def lists_rejected(feature: Feature) -> bool:
    """Whether the feature holds a list of rejected responses (of one or more) and not a single response."""
    ids = feature["rejected_ids"]
    return len(ids) > 0 and (isinstance(ids[0], Sequence) or getattr(ids[0], "ndim", 0) > 0)


def cut(feature: Feature, max_length: int | None) -> Feature:
    """The feature with its responses (and their masks) cut where `max_length` tokens of prompt and response end.

    The prompt is left whole: where it fills the limit, no response is left and the pair has nothing to score.
    """
    if max_length is None:
        return feature
    room = max(0, max_length - len(feature["prompt_ids"]))
    several = lists_rejected(feature)
    kept = dict(feature)
    for name in ("chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"):
        if (value := feature.get(name)) is not None:
            nested = several and name.startswith("rejected")
            kept[name] = [list(each)[:room] for each in value] if nested else list(value)[:room]
    return kept


def nothing_to_score(feature: Feature) -> str | None:
    """Which response has no token to score ("the chosen response", "rejected response 2"); None if all have one.

    Without a prompt the first token of a response has no logits to be scored by.
    """
    first = 0 if feature["prompt_ids"] else 1
    several = lists_rejected(feature)
    responses = [("the chosen response", feature["chosen_ids"], feature.get("chosen_mask"))]
    masks = feature.get("rejected_mask")
    for index, ids in enumerate(rejected_responses(feature)):
        mask = None if masks is None else masks[index] if several else masks
        responses.append((f"rejected response {index}" if several else "the rejected response", ids, mask))
    for name, ids, mask in responses:
        scored = range(first, len(ids)) if mask is None else [k for k in range(first, len(ids)) if mask[k]]
        if not scored:
            return name
    return None


def scorable(feature: Feature) -> bool:
    """Whether the pair compares something: each response has a token to score, no rejected one equals the chosen."""
    chosen = list(feature["chosen_ids"])
    return nothing_to_score(feature) is None and all(list(ids) != chosen for ids in rejected_responses(feature))


def preference_features(
    tokenizer: Any,
    rows: Iterable[dict[str, Any] | Preference],
    max_length: int | None = None,
    *,
    score_turns: str = "all",
    skip_bad_rows: bool = False,
    model: Any = None,
) -> list[Feature]:
    """Features of rows in TRL's preference format (`prompt`, `chosen`, `rejected`: strings or conversations).

    Tokenised as TRL's `DPOTrainer` does (see `encode`), cut to `max_length` tokens of prompt and response. Pairs with
    nothing left to compare are left out, with a `PreferenceWarning` that says how many.

    Args:
        tokenizer: see `encode`.
        rows: dictionaries (see `infopo_kernels.integrations.preference_rows`), or what `read_preferences` gave.
        max_length: tokens; None never cuts.
        score_turns: see `encode`.
        skip_bad_rows: leave out rows that cannot be used, with one warning: how many, the first ones, and why.
        model: the model (or its configuration) that will take the features: they are compared with its vocabulary and
            its positions (see `check_features`).

    Raises:
        PreferenceError: a row is wrong (names row and field; counts the others), no pair is left, or the model cannot
            take one of them.
    """
    features: list[Feature] = []
    places: list[str] = []
    problems: list[PreferenceError] = []
    lost: list[tuple[str, str]] = []
    longest = dropped = 0
    for index, row in enumerate(rows):
        try:
            pair = row if isinstance(row, Preference) else parse_preference(row, f"row {index}")
            feature, end = _encode(tokenizer, pair, score_turns)
        except PreferenceError as problem:
            problems.append(problem)
            continue
        longest = max(longest, _length(feature))
        feature = cut(feature, max_length)
        if not scorable(feature):
            dropped += 1
            continue
        if end:
            lost.append((pair.where, end))
        features.append(feature)
        places.append(pair.where)
    report_bad_rows(problems, len(features) + dropped + len(problems), skip=skip_bad_rows)
    _check_what_is_left(len(features), dropped, max_length, longest)
    _warn_of_lost_prompts(lost, len(features))
    if any(map(lists_rejected, features)):  # one depth, so that the features can become a table
        for feature in features:
            if not lists_rejected(feature):
                for name in ("rejected_ids", "rejected_mask", "ref_rejected_logps"):
                    if name in feature:
                        feature[name] = [feature[name]]
    if model is not None:
        check_features(features, model, places)
    return features


def _length(feature: Feature) -> int:
    return len(feature["prompt_ids"]) + max(map(len, [feature["chosen_ids"], *rejected_responses(feature)]))


def _check_what_is_left(kept: int, dropped: int, max_length: int | None, longest: int | None) -> None:
    """Refuse if no pair is left; warn if some pairs were left out because they have nothing to score."""
    if not dropped and kept:
        return
    within = "" if max_length is None else f" within max_length {max_length}"
    if not kept:
        detail = f" (the longest pair has {longest} tokens)" if longest and max_length is not None else ""
        raise PreferenceError(
            f"no pair has two different responses to score{within}{detail}; raise the limit or shorten the prompts."
        )
    warnings.warn(
        f"{dropped} of {kept + dropped} pairs are left out: they have no two different responses to score{within}.",
        PreferenceWarning,
        stacklevel=3,
    )


_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_LOST, _BAD = "_lost_prompt", "_problem"


class _RowEncoder:
    """The function that `feature_dataset` maps over rows: an object that `datasets` can hash and send to processes."""

    def __init__(self, tokenizer: Any, name: str, score_turns: str, masks: bool, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.score_turns = score_turns
        self.masks = masks
        self.max_length = max_length

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"{self.name} dataset, row {index}"
        empty: dict[str, Any] = dict.fromkeys((*_IDS, *(("chosen_mask", "rejected_mask") if self.masks else ())))
        try:
            feature, lost = _encode(self.tokenizer, parse_preference(row, where), self.score_turns)
        except PreferenceError as problem:
            return {**empty, _BAD: f"{problem.field or ''}\n{problem.reason}", _LOST: None}
        feature = cut(feature, self.max_length)
        if self.masks and "chosen_mask" not in feature:
            feature["chosen_mask"] = [1] * len(feature["chosen_ids"])
            ids = feature["rejected_ids"]
            feature["rejected_mask"] = [[1] * len(each) for each in ids] if lists_rejected(feature) else [1] * len(ids)
        # The row's own columns (its weight, its references) stay as they are.
        return {**{key: feature[key] for key in empty}, _BAD: None if scorable(feature) else "", _LOST: lost or None}


def feature_dataset(
    dataset: Any,
    tokenizer: Any,
    max_length: int | None = None,
    *,
    score_turns: str = "all",
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
    name: str = "train",
) -> Any:
    """`preference_features` for a `datasets.Dataset` or `IterableDataset`: the same rows with the features' columns.

    Other columns stay, except those that a feature has; `Dataset.map` tokenises the rows, with its cache. Masks are a
    column of a stream, and of a table if `score_turns` is "assistant" or messages have weights. A stream is
    checked as it is read: a bad row raises then, or with `skip_bad_rows` warns and is passed over.

    Args:
        dataset: rows in TRL's preference format; returned as it is if it holds `prompt_ids`, `chosen_ids` and
            `rejected_ids` already.
        tokenizer, max_length, score_turns, skip_bad_rows: see `preference_features`.
        num_proc: processes, of a `Dataset`.
        name: what messages call it: "train dataset, row 3".

    Raises:
        PreferenceError: see `preference_features`.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise PreferenceError(f"the {name} dataset has no rows.")
    if all(first.get(key) is not None for key in _IDS):
        return dataset
    if not hasattr(dataset, "__len__"):  # a later row may have weights: only a table has the columns of all in one
        return _feature_stream(dataset, _RowEncoder(tokenizer, name, score_turns, True, max_length), skip_bad_rows)
    shown = next((row for row in dataset if row.get("chosen") and row.get("rejected")), None)
    if shown is None:  # every row is wrong, and the first one says how
        parse_preference(first, f"{name} dataset, row 0")
        raise AssertionError("a row without responses was taken")
    masks = score_turns != "all" or any(
        isinstance(turn, dict) and "weight" in turn
        for response in (shown["chosen"], *shown["rejected"])
        for turn in (response if isinstance(response, list) else [response])
    )
    encoder = _RowEncoder(tokenizer, name, score_turns, masks, max_length)
    # Imported here: `datasets` is optional, and whoever passes one of its datasets has it.
    datasets = importlib.import_module("datasets")
    ids = datasets.List(datasets.Value("int64"))
    several = isinstance(shown["rejected"], list) and not isinstance(shown["rejected"][0], dict)
    columns = dict.fromkeys(("prompt_ids", "chosen_ids", *(("chosen_mask",) if masks else ())), ids)
    columns |= dict.fromkeys(
        ("rejected_ids", *(("rejected_mask",) if masks else ())), datasets.List(ids) if several else ids
    )
    columns |= dict.fromkeys((_BAD, _LOST), datasets.Value("string"))
    mapped = dataset.map(
        encoder,
        with_indices=True,
        num_proc=num_proc,
        features=datasets.Features({**dataset.features, **columns}),
        desc=f"Tokenizing {name} dataset",
    )
    reasons = mapped[_BAD]
    problems = [
        _stored_problem(f"{name} dataset, row {index}", reason) for index, reason in enumerate(reasons) if reason
    ]
    report_bad_rows(problems, len(mapped), skip=skip_bad_rows)
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    _check_what_is_left(len(kept), len(mapped) - len(problems) - len(kept), max_length, None)
    if len(kept) < len(mapped):
        mapped = mapped.select(kept)
    _warn_of_lost_prompts(
        [(f"{name} dataset, row {kept[k]}", text) for k, text in enumerate(mapped[_LOST]) if text], len(mapped)
    )
    return mapped.remove_columns([_BAD, _LOST])


def _stored_problem(where: str, stored: str) -> PreferenceError:
    field, _, reason = stored.partition("\n")
    return PreferenceError(reason, where=where, field=field or None)


def _feature_stream(dataset: Any, encoder: _RowEncoder, skip_bad_rows: bool) -> Any:
    warned = False

    def usable(row: dict[str, Any], index: int) -> bool:
        nonlocal warned
        if row[_BAD]:
            problem = _stored_problem(f"{encoder.name} dataset, row {index}", row[_BAD])
            if not skip_bad_rows:
                raise problem
            warnings.warn(f"left out: {problem}", PreferenceWarning, stacklevel=2)
        elif row[_BAD] is None and row[_LOST] and not warned:
            warned = True
            _warn_of_lost_prompts([(encoder.name + " dataset", row[_LOST])], 1)
        return row[_BAD] is None

    return dataset.map(encoder, with_indices=True).filter(usable, with_indices=True).remove_columns([_BAD, _LOST])
