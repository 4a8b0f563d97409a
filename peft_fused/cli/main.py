"""Commands and their options. The work is imported by the command that needs it."""

from pathlib import Path
from typing import Annotated

import typer

from peft_fused.registry import METHODS

app = typer.Typer(
    name="peft-fused",
    help="Fast drop-in PEFT adapters: what runs here, is it right, how fast is it, and does it train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on standard output.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the result files.")]


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, hardware, what is built, which path each op takes and why, and what is missing."""
    from . import env as command

    command.run(as_json)


@app.command()
def check(device: Device = "cpu", as_json: AsJson = False) -> None:
    """Check every op, backend and dtype on this machine against float64; exit code 1 if one is wrong."""
    from . import check as command

    command.run(device, as_json)


@app.command()
def bench(
    device: Device = "cpu",
    op: Annotated[
        str,
        typer.Option(
            help="One op, or all; a wrong name is answered with the names there are. One op alone is written with "
            "--out only."
        ),
    ] = "all",
    everything: Annotated[bool, typer.Option("--all", help="More shapes, and torch.compile for each layer.")] = False,
    tiny: Annotated[
        bool, typer.Option(help="A few tiny shapes: a smoke test, not a measurement; written with --out only.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Start no shape after so many seconds; the first ones matter most.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="A commit of this checkout, built and measured in turns with this one. Rows have their ratio to it, "
            "and that ratio's standard error."
        ),
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time adapted layers against the frozen layer, PEFT, plain PyTorch, and compiled PEFT; and structured maps
    against plain PyTorch, PEFT's C3A, the dense matrix, and themselves by each method."""
    from . import bench as command

    command.run(device, op=op, everything=everything, tiny=tiny, seconds=seconds, base=base, out=out, as_json=as_json)


@app.command()
def demo(
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"lora, {', '.join(METHODS)}, or all (default); may be given several times."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Path or hub id of an encoder (default: all-MiniLM-L6-v2)")] = None,
    data: Annotated[Path | None, typer.Option(help="TSV, CSV or JSONL to train on (default: bundled text)")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="File to evaluate on; without it 20 % of --data are held out.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    target_modules: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated layers to adapt (default: query and value; for some methods those of their papers)"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each method.")] = 100,
    rank: Annotated[int, typer.Option(min=1, max=256, help="Rank of LoRA, and of methods with one like it.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 16.0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; more than one adds mean and spread.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int, typer.Option(min=4, help="Tokens kept of each text.")] = 64,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate of LoRA; others have a multiple of it.")] = 3e-3,
    eval_rows: Annotated[int, typer.Option(min=1, help="Rows evaluated at most.")] = 1000,
    device: Device = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Train PEFT LoRA and, beside it on the same batches, the methods chosen, on real text, and compare them."""
    from . import demo as command

    settings = command.Settings(
        model=model, methods=tuple(method or ("all",)), steps=steps, rank=rank, alpha=alpha, seeds=seeds,
        batch_size=batch_size, max_length=max_length, lr=lr, eval_rows=eval_rows,
        target_modules=target_modules.split(",") if target_modules else None, device=device,
    )  # fmt: skip
    command.run(settings, data, evaluation, text_column, label_column, out, as_json)
