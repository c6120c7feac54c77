"""The command line's flags. One that is not given leaves the file's value or the default."""

from pathlib import Path
from typing import Annotated

import typer

from magicdec.config import DRAFTERS
from magicdec.deployments.embedded_model import EMBEDDED_MODEL_NAME

Config = Annotated[
    Path | None, typer.Option(help="YAML settings file; flags override it.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(
        help=f"Hugging Face folder or hub id; default: {EMBEDDED_MODEL_NAME}.", show_default=False
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="bfloat16, float16, or float32 (exact).", show_default=False)
]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest context in tokens.", show_default=False)
]
KvCacheGib = Annotated[
    float | None,
    typer.Option(
        help="KV pool of one rank, GiB; default: what a GPU has left, 2 on a CPU.",
        show_default=False,
    ),
]
DraftLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens drafted a round; 0: no drafts; not given: each round chooses.",
        show_default=False,
    ),
]
DraftBudget = Annotated[
    float | None,
    typer.Option(
        help="KV positions a draft step reads; below 1, a share of the context.", show_default=False
    ),
]
Drafter = Annotated[
    str | None, typer.Option(help=f"Who drafts: {', '.join(DRAFTERS)}.", show_default=False)
]
DraftModel = Annotated[
    str | None,
    typer.Option(help="Folder or hub id of a smaller model that drafts.", show_default=False),
]
Verification = Annotated[
    str | None,
    typer.Option(
        help="shared_gumbel, or optimal_coupling, which gives up seed replay and the token-equal "
        "resume of a broken stream.",
        show_default=False,
    ),
]
TensorParallel = Annotated[
    int | None, typer.Option("--tensor-parallel-size", help="Ranks a replica.", show_default=False)
]
NumThreads = Annotated[int | None, typer.Option(help="torch threads a rank.", show_default=False)]
ServedName = Annotated[str | None, typer.Option(help="Name clients use.", show_default=False)]
NumReplicas = Annotated[int | None, typer.Option(help="Copies of the engine.", show_default=False)]
Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)]
Port = Annotated[int | None, typer.Option(help="TCP port.", show_default=False)]
ApiKeysFile = Annotated[
    str | None, typer.Option(help="File with one API key a line.", show_default=False)
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the workers' logs.")]

Prompt = Annotated[str | None, typer.Argument(help="The prompt; without one, stdin is read.")]
PromptFile = Annotated[
    Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)
]
Chat = Annotated[bool, typer.Option(help="Use the model's chat template, or continue raw text.")]
MaxTokens = Annotated[int, typer.Option(help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int | None, typer.Option(help="Seed of sampling.", show_default=False)]
