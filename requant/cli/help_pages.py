"""The help of each command beside its docstring and options: files, examples, exit codes, related commands.

Data, so that the examples can be run by a test and the reference be made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_CODES = {
    0: "done",
    1: "an error in requant itself",
    2: "usage",
    3: "bad input: not a GGUF, damaged, another model's imatrix, ...",
    4: "the budget is too small; the smallest that fits is named",
    5: "output refused: it exists (--force), is an input, is being written, or its .part is not requant's",
    6: "I/O: disk full, no permission, read errors, no memory",
    7: "the source changed while it was read",
    8: "numbers failed a check: NaN in the source, or a type that cannot hold these weights",
    9: "of a batch: some outputs are done, some are not",
    130: "stopped by SIGINT (Ctrl-C); 143 by SIGTERM, 129 by SIGHUP",
}
ENVIRONMENT = (
    ("NO_COLOR", "Anything: pictures without colours; so does TERM=dumb."),
    ("FORCE_COLOR", "Anything but 0, or CLICOLOR_FORCE: pictures, in colour, in pipes and files too."),
    ("COLUMNS", "The width of pictures and tables, where it is not the terminal's."),
    ("_REQUANT_COMPLETE", "bash_source, zsh_source or fish_source: print the shell's completion."),
)
OTHER = "Options"
_OF_A_PLAN = "..."  # in their place: the options of `planning.options` under the heading
# heading -> options by their last name, in the order of the help
HEADINGS = {
    "Budget": (_OF_A_PLAN,),
    "Memory and engine": (_OF_A_PLAN,),
    "Types": ("--type", "--preset", "--like", "--plan", _OF_A_PLAN, "--allow-requantize", "--nonfinite"),
    "Data": ("--base", "--source", "--full", "--evaluation"),
    "Model card": (
        *("--base-model", "--license", "--license-name", "--license-link", "--language", "--tag", "--quantized-by"),
        "--repo",
    ),
    "Scoring": (
        *("--losses", "--imatrix", "--no-imatrix", "--statistics", "--quick", "--text", "--tokens", "--windows"),
        *("--window", "--no-gradients", "--effort", "--measure", "--compensate", "--no-compensate"),
    ),
    "Output": (
        *("--output", "--emit-imatrix", "--emit-tensor-types", "--explain", "--frontier", "--tensors", "--json"),
        *("--dry-run", "--keep-split", "--max-shard-size", "--no-verify", "--report", "--force", "--state"),
    ),
    "Running": (
        *("--jobs", "--keep-going", "--restart", "--threads", "--max-memory", "--cluster", "--progress", "--quiet"),
        *("--verbose", "--debug", "--version", "--help"),
    ),
}


def full_headings() -> dict[str, tuple[str, ...]]:
    """Return heading -> options with those of a plan, which take a while to import."""
    from requant.planning.options import PLAN_OPTIONS

    flags = {heading: [o.flag for o in PLAN_OPTIONS if o.heading == heading] for heading in HEADINGS}
    return {
        heading: tuple(flag for name in names for flag in (flags[heading] if name == _OF_A_PLAN else [name]))
        for heading, names in HEADINGS.items()
    }


@dataclass(frozen=True, slots=True)
class Example:
    """A command line as one types it, and its purpose."""

    command: str
    what: str


@dataclass(frozen=True, slots=True)
class Page:
    """The parts of a command's help beside docstring and options; `files`: those read and written, by metavar."""

    files: tuple[tuple[str, str], ...] = ()
    examples: tuple[Example, ...] = ()
    exit_codes: tuple[int, ...] = ()
    see: tuple[str, ...] = ()
    environment: bool = False


_READING = (0, 2, 3, 6)
_MODEL = ("MODEL", "The model, read: a GGUF, or any shard of a split one.")
_RECORD = "OUT.requant.json"

MAIN = Page(
    examples=(
        Example("requant inspect model.gguf --ctx 16384", "What a model is made of and needs"),
        Example(
            "requant convert model.gguf out.gguf --vram 12GiB --ctx 16384",
            "Make it fit a card of 12 GiB with 16384 tokens of context",
        ),
        Example("requant help plan", "All about one command"),
    ),
    exit_codes=tuple(EXIT_CODES),
    environment=True,
)
PAGES = {
    "inspect": Page(
        files=(_MODEL,),
        examples=(
            Example("requant inspect model.gguf", "What it is made of, and its needs at 4096 tokens or less"),
            Example("requant inspect model.gguf --ctx 16k", "What it needs with 16384 tokens of context"),
            Example("requant inspect model.gguf --tensors", "Every tensor, and why some would stay as they are"),
            Example("requant inspect model.gguf --json", "The same for a program"),
        ),
        exit_codes=_READING,
        see=("plan", "diff"),
    ),
    "calibrate": Page(
        files=(
            _MODEL,
            ("-o STATS", "Written: a GGUF importance matrix with squared gradients beside it."),
            ("STATS.part.npz", "What a stopped run has done; the same command goes on from it."),
        ),
        examples=(
            Example("requant calibrate model.gguf -o stats.gguf", "On the text that ships with requant"),
            Example(
                "requant calibrate model.gguf --text text.txt --windows 16 -o mine.gguf",
                "On 16 windows of a text of yours",
            ),
            Example(
                "requant calibrate model.gguf --no-gradients -o imatrix.gguf",
                "Only an importance matrix, in a third of the time",
            ),
        ),
        exit_codes=(0, 2, 3, 5, 6, 7, 8, 130),
        see=("score", "evaluate"),
    ),
    "score": Page(
        files=(_MODEL, ("-o LOSSES", "Written: the losses as JSON, for any number of plans.")),
        examples=(
            Example("requant score model.gguf -o losses.json", "From gradients on the text that ships"),
            Example("requant score model.gguf --quick -o quick.json", "In seconds and worse, without running it"),
            Example("requant score model.gguf --types Q4_K,Q5_K,Q6_K,IQ4_XS -o few.json", "Only these types"),
            Example(
                "requant score model.gguf --emit-imatrix i.gguf -o weighed.json",
                "Keep the importance measured on the way, for convert --imatrix",
            ),
            Example(
                "requant score model.gguf --statistics stats.gguf -o again.json",
                "From what calibrate wrote, without running the model again",
            ),
        ),
        exit_codes=(0, 2, 3, 5, 6, 7, 8, 130),
        see=("calibrate", "plan"),
    ),
    "plan": Page(
        files=(_MODEL, ("-o PLAN", "Written: the plan as JSON, to edit, compare, and give to convert --plan.")),
        examples=(
            Example(
                "requant plan model.gguf --losses losses.json --vram 12GiB -o plan.json",
                "For a card of 12 GiB, in a file for convert --plan",
            ),
            Example(
                "requant plan model.gguf --losses losses.json --vram 8GiB,12GiB --ctx 16384",
                "For two cards with 16384 tokens of context, a line each",
            ),
            Example(
                "requant plan model.gguf --losses losses.json --vram 12GiB --ram 48GiB",
                "What does not fit the card goes to the CPU",
            ),
            Example(
                "requant plan model.gguf --losses losses.json --max-loss 0.02",
                "The fewest bytes for a predicted loss of 0.02 nats per token",
            ),
            Example(
                "requant plan model.gguf --losses losses.json --bpw 5 --min-type attn_v=q6_k",
                "5 bits per weight, and nothing smaller than Q6_K for some tensors",
            ),
        ),
        exit_codes=(0, 2, 3, 4, 5, 6, 7, 8, 130),
        see=("score", "convert", "diff"),
    ),
    "convert": Page(
        files=(
            _MODEL,
            ("OUT", "Written: the quantized model, complete or not at all."),
            (_RECORD, "Written beside it: the full plan, and the errors measured."),
            ("OUT.part, OUT.part.journal", "What a stopped run has done; the same command goes on from it."),
        ),
        examples=(
            Example(
                "requant convert model.gguf out.gguf --vram 12GiB --ctx 16384",
                "Score, plan, write and verify, for a card of 12 GiB",
            ),
            Example("requant convert model.gguf planned.gguf --plan plan.json", "As a plan says"),
            Example("requant convert model.gguf q4.gguf --preset Q4_K_M", "llama-quantize's types, our encoders"),
            Example("requant convert model.gguf q5.gguf --type Q5_K", "One type for all that may be quantized"),
            Example("requant convert model.gguf small.gguf --losses losses.json --size 7MiB", "A file of 7 MiB"),
        ),
        exit_codes=(0, 2, 3, 4, 5, 6, 7, 8, 130),
        see=("plan", "verify", "evaluate", "batch"),
    ),
    "batch": Page(
        files=(
            ("JOBS.toml", "Read: the models and budgets; docs/batch.md describes it."),
            ("JOBS.toml.requant/", "Written: scores, plans and what is done, for the next run."),
        ),
        examples=(
            Example("requant batch jobs.toml --dry-run", "What would be made"),
            Example("requant batch jobs.toml", "Make it; again: only what is missing"),
            Example("requant batch jobs.toml --jobs 2 --keep-going", "Two at a time, whatever fails"),
        ),
        exit_codes=(0, 2, 3, 4, 5, 6, 7, 8, 9, 130),
        see=("convert",),
    ),
    "report": Page(
        files=(
            ("INPUT", "Read: outputs or their records, folders of records, a batch's JOBS.toml, a plan."),
            ("-o", "Written: pages, model cards, pictures."),
        ),
        examples=(
            Example("requant report out.gguf -o README.md -o plan.png", "A model card that shows a picture"),
            Example("requant report out.gguf -o report.html --source model.gguf", "A page, with the model's SHA-256"),
            Example("requant report plan.json -o plan.svg", "A picture of a plan"),
        ),
        exit_codes=(0, 2, 3, 5, 6, 7, 130),
        see=("convert", "evaluate", "batch"),
    ),
    "diff": Page(
        files=(("A, B", "Read: plans, records of conversions (OUT.requant.json) or GGUFs."),),
        examples=(
            Example("requant diff plan.json out.gguf.requant.json", "Two plans, or a plan and a record"),
            Example("requant diff model.gguf out.gguf", "Two models"),
            Example("requant diff plan.json out.gguf --json", "A plan and a model, for a program"),
        ),
        exit_codes=_READING,
        see=("plan", "verify"),
    ),
    "verify": Page(
        files=(("OUT", "Read, every byte: the converted model."), (_RECORD, "Read where it is beside OUT.")),
        examples=(
            Example("requant verify out.gguf", "Against its record"),
            Example("requant verify out.gguf --source model.gguf", "Against the model it was made from, too"),
            Example("requant verify out.gguf --plan plan.json", "Against a plan"),
        ),
        exit_codes=(0, 2, 3, 6, 7, 8, 130),
        see=("convert", "diff", "evaluate"),
    ),
    "evaluate": Page(
        files=(("MODEL", "Read: the model to measure."),),
        examples=(
            Example("requant evaluate model.gguf --text text.txt", "Perplexity"),
            Example(
                "requant evaluate out.gguf --base model.gguf --text text.txt", "How far the output is from its source"
            ),
            Example("requant evaluate out.gguf --base model.gguf --text text.txt --json", "The same for a program"),
        ),
        exit_codes=(0, 2, 3, 6, 7, 8, 130),
        see=("verify", "calibrate"),
    ),
}
