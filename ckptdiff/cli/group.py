"""The command group: its help comes from a table, and a command's module is imported only to run it."""

from __future__ import annotations

import importlib

import click

from ckptdiff import __version__

COMMANDS = {
    "diff": "Compare two checkpoints; keep figures and masks in a run file.",
    "show": "Print any view of a run file.",
    "report": "Write a run file's pictures and tables as one HTML file.",
    "inspect": "List the tensors of a checkpoint.",
    "mask": "List the masks of a run file, export them, or combine those of several.",
    "patch": "Make, apply, verify and join exact weight deltas.",
    "track": "Follow an update through the checkpoints of a training run.",
    "overlap": "Compare the masks of several runs with each other and with chance.",
    "spectra": "Add spectra to a run file, or plot them.",
    "claims": "Judge the sparse-update paper's claims for a pair.",
    "lora": "Write the update as a PEFT (LoRA) adapter.",
    "doctor": "Say what this machine offers, and test every backend on it.",
}
"""Every command with its short help."""


class LazyGroup(click.Group):
    """A group of the commands in :data:`COMMANDS`, each in the module of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"ckptdiff.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing one of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 a check failed or, with --exit-code, something differs; 2 trouble; "
    "130 Ctrl-C; 141 nobody reads the output; 143 terminated.",
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s", help="Show the version and exit.")
def ckptdiff() -> None:
    """What did post-training change in this model? A streaming diff for model checkpoints."""
