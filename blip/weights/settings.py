"""What can be chosen for a model after it is made: beams, lengths, the prompt; each within what the model can do."""

from collections.abc import Mapping
from typing import Any

from blip.errors import BundleError
from blip.lavis import prompt_tokens

MOST_BEAMS = 32  # of which each has a place in memory for every token
#: The settings of each task's config.json that can be changed.
SETTINGS = {
    "caption": ("num_beams", "min_length", "max_length", "prompt"),
    "answer": ("num_beams", "min_length", "max_length", "max_txt_len"),
    "match": ("max_txt_len",),
}
LONGEST_PROMPT = 1000  # characters
USUAL_TOKENS = 20  # that transformers' generate adds to what it is given, unless it is told other


def changed(given: str, configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str, Any]:
    """The task, the setting and the value of `caption.num_beams=5`.

    Raises:
        BundleError: the bundle has no such task, the task no such setting, or the value is of another type.
    """
    name, equals, value = given.partition("=")
    task, dot, setting = name.partition(".")
    if not equals or not dot:
        raise BundleError(f"{given} is no setting; write TASK.SETTING=VALUE, such as caption.num_beams=5.")
    if task not in configs:
        raise BundleError(f"{given} is about a task that the bundle does not have; it has {', '.join(configs)}.")
    if setting not in SETTINGS[task]:
        raise BundleError(f"{given} is no setting of {task}, which has {', '.join(SETTINGS[task])}.")
    if setting == "prompt":
        if not value.isprintable():
            raise BundleError(f"{ascii(given)[1:-1]} has characters that cannot be shown; use words.")
        return task, setting, value
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        raise BundleError(f"{given} is no number; write one, such as {name}=5.")
    return task, setting, int(value)


def usual_length(task: str, config: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
    """What transformers' captions have where nothing else is set: 20 tokens after the prompt."""
    if task != "caption" or config.get("library") != "transformers":
        return {}
    return {"max_length": prompt_tokens(_prompt(config["prompt"], tokenizer), tokenizer) + USUAL_TOKENS}


def checked(task: str, config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`config` when the model can do what it says, its prompt written as the model's own words are.

    Raises:
        BundleError: it names the setting, its value and the limit.
    """
    check_numbers(task, config, tokenizer)
    return {**config, "prompt": _prompt(config["prompt"], tokenizer)} if task == "caption" else dict(config)


def check_numbers(task: str, config: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise a BundleError unless the model can have as many beams and tokens as `config` says.

    It names the setting, its value and the limit.
    """
    positions = config["text"]["max_position_embeddings"]
    if task != "match":
        begin = 1
        if task == "caption":
            characters = len(config["prompt"])
            if characters > LONGEST_PROMPT:
                raise BundleError(f"caption.prompt has {characters} characters; use {LONGEST_PROMPT} at most.")
            begin = prompt_tokens(config["prompt"], tokenizer)
            if config.get("library") == "transformers" and begin >= config["max_txt_len"]:
                most = config["max_txt_len"] - 2
                raise BundleError(f"caption.prompt has {begin - 1} tokens and the model takes {most}; use fewer words.")
        _within(task, config, "num_beams", 1, min(MOST_BEAMS, (config["text"]["vocab_size"] - 1) // 2))
        _within(task, config, "max_length", begin + 1, positions)
        _within(task, config, "min_length", 0, config["max_length"])
    if task != "caption":
        _within(task, config, "max_txt_len", 3, positions)


def _within(task: str, config: Mapping[str, Any], name: str, least: int, most: int) -> None:
    value = config[name]
    if type(value) is not int or not least <= value <= most:  # true is an int as well
        raise BundleError(f"{task}.{name}={value} is beyond the model; set it to a number from {least} to {most}.")


def _prompt(prompt: str, tokenizer: Any) -> str:
    """The prompt as it comes back at the beginning of a caption, where it is cut off by its length."""
    ids = tokenizer(prompt).input_ids[1:-1]
    if tokenizer.unk_token_id in ids:
        raise BundleError(f"caption.prompt={prompt} has a word that the model's vocabulary lacks; use another.")
    if set(ids) & set(tokenizer.all_special_ids):
        raise BundleError(f"caption.prompt={prompt} has a special token; use words.")
    words: str = tokenizer.decode(ids)
    if tokenizer(words).input_ids[1:-1] != ids:
        raise BundleError(f"caption.prompt={prompt} is written {words} in captions, which is another; use other words.")
    return f"{words} " if words else ""
