"""`recsys --version` and `recsys --completion SHELL`, answered without importing torch.

The options of a command are read from the source of its function, so the script is up to date and made in a moment.
"""

import ast
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from recsys2stage import __version__
from recsys2stage.cli import configs

SHELLS = ("bash", "zsh", "fish")
PACKAGE = Path(__file__).parents[1]


def _names(text: str) -> list[str]:
    return text.split()


POSITIONAL = {"init": "folder", "list": "kind"}  # command -> the option that may be given without its name
TRAINING = _names(
    "config output model data trust seed_everything ckpt_path trainer.max_epochs trainer.accelerator trainer.devices "
    "trainer.precision trainer.strategy trainer.gradient_clip_val trainer.enable_progress_bar trainer.logger "
    "checkpoint.monitor early_stopping.patience last.every_n_train_steps data.init_args.path data.init_args.batch_size "
    "data.init_args.max_length data.init_args.request_time model.init_args.dim model.init_args.encoder "
    "model.init_args.loss model.init_args.scorer model.init_args.optimizer print_config help"
)
KINDS = ("configs", "overlays", "encoders", "losses", "optimizers", "signals", "baselines", "scorers", "sources")
GLOBAL = ("--help", "--version", "--completion")


def answer(arguments: Sequence[str]) -> bool:
    """Prints the version or a completion script, if that is what the arguments ask for; returns whether they do."""
    first, *rest = arguments or [""]
    option, equals, value = first.partition("=")
    if option == "--version":
        print(f"recsys2stage {__version__}")
        return True
    if option != "--completion":
        return False
    shell = value if equals else (rest[0] if rest else "")
    if shell not in SHELLS:
        sys.exit(
            f"recsys: --completion is {shell!r}, expected {', '.join(SHELLS[:-1])} or {SHELLS[-1]}; for bash put into "
            '~/.bashrc: eval "$(recsys --completion bash)"'
        )
    print(fish_script() if shell == "fish" else bash_script(zsh=shell == "zsh"))
    return True


def name_positional(argv: list[str]) -> None:
    """Gives `recsys init DIR` and `recsys list KIND` the names of their options: --folder DIR, --kind KIND."""
    option = POSITIONAL.get(argv[1] if len(argv) > 1 else "")
    number = 2
    while option and number < len(argv):
        if not argv[number].startswith("-"):
            argv[number : number + 1] = [f"--{option}", argv[number]]
            return
        number += 1 if "=" in argv[number] or argv[number] in ("-h", "--help") else 2


@cache
def options() -> dict[str, dict[str, tuple[str, ...]]]:
    """Command -> option without its dashes -> the values it takes, () if they are not known."""
    tree = _parse("recsys2stage.cli.commands")
    modules = _imports(tree)
    table = next(
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)
    )
    commands: dict[str, dict[str, tuple[str, ...]]] = {
        verb: dict.fromkeys(TRAINING, ()) for verb in ("fit", "validate", "test")
    }
    for key, value in zip(table.keys, table.values, strict=True):
        if isinstance(key, ast.Constant):
            own = _arguments(modules[value.id], value.id) if isinstance(value, ast.Name) and value.id in modules else {}
            commands[str(key.value)] = {**own, "config": (), "print_config": (), "help": ()}
    commands["list"]["kind"] = KINDS
    shipped = configs.shipped_configs()
    names = [name for name in configs.datasets(shipped) if name != configs.STARTER]
    commands["init"]["template"] = ("table", *names)
    return commands


def _parse(module: str) -> ast.Module:
    path = PACKAGE.parent / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name -> the module of this package that it is imported from."""
    return {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name)
        for alias in node.names
        if node.module
    }


def _arguments(module: str, function: str) -> dict[str, tuple[str, ...]]:
    """Arguments of a function and the values they take: true and false, those of a Literal, or () if unknown."""
    tree = _parse(module)
    modules = _imports(tree)
    defined = [node.args for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    found = {}
    for argument in (argument for arguments in defined for argument in (*arguments.args, *arguments.kwonlyargs)):
        annotation = argument.annotation
        names = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)] if annotation else []
        known = ("true", "false") if "bool" in names else _literal(annotation)
        for name in names if not known else ():
            known = known or _alias(tree, name) or (_alias(_parse(modules[name]), name) if name in modules else ())
        found[argument.arg] = known
    return found


def _alias(tree: ast.Module, name: str) -> tuple[str, ...]:
    """The values of `name = Literal[...]` in a module."""
    values = (node.value for node in tree.body if isinstance(node, ast.Assign) and _targets(node) == [name])
    return next((_literal(value) for value in values), ())


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def _literal(node: ast.AST | None) -> tuple[str, ...]:
    """The values of a Literal within an annotation."""
    for inner in ast.walk(node) if node is not None else ():
        if isinstance(inner, ast.Subscript) and isinstance(inner.value, ast.Name) and inner.value.id == "Literal":
            return tuple(str(part.value) for part in ast.walk(inner.slice) if isinstance(part, ast.Constant))
    return ()


def bash_script(zsh: bool = False) -> str:
    """The completion function for bash; zsh reads it too, by its bashcompinit."""
    cases, values = [], []
    for verb, table in options().items():
        cases.append(f'        {verb}) words="{" ".join(f"--{name}" for name in table)}" ;;')
        values += [f'        {verb}:--{name}) words="{" ".join(known)}" ;;' for name, known in table.items() if known]
    for verb, option in POSITIONAL.items():
        if known := options()[verb][option]:
            cases[list(options()).index(verb)] = f'        {verb}) words="{" ".join(known)}" ;;'
    lines = [
        '# completion of recsys: eval "$(recsys --completion ' + ("zsh" if zsh else "bash") + ')"',
        *(["autoload -Uz compinit bashcompinit && compinit -u && bashcompinit"] if zsh else []),
        "_recsys() {",
        "    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} verb=${COMP_WORDS[1]} words=",
        "    if [ $COMP_CWORD -eq 1 ]; then",
        f'        COMPREPLY=($(compgen -W "{" ".join((*options(), *GLOBAL))}" -- "$current")); return',
        "    fi",
        '    case "$verb:$previous" in',
        f'        --completion:*) words="{" ".join(SHELLS)}" ;;',
        *values,
        '        *:--*) COMPREPLY=($(compgen -f -- "$current")); return ;;',
        "    esac",
        '    [ -n "$words" ] || case "$verb" in',
        *cases,
        "    esac",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        '    [ ${#COMPREPLY[@]} -gt 0 ] || COMPREPLY=($(compgen -f -- "$current"))',
        "}",
        "complete -o filenames -F _recsys recsys",
    ]
    return "\n".join(lines)


def fish_script() -> str:
    """The completions for fish."""
    verbs = " ".join(options())
    lines = [
        "# completion of recsys: recsys --completion fish | source",
        f"complete -c recsys -n 'not __fish_seen_subcommand_from {verbs}' -f -a '{verbs}'",
        *(f"complete -c recsys -n 'not __fish_seen_subcommand_from {verbs}' -l {name[2:]}" for name in GLOBAL),
        f"complete -c recsys -l completion -x -a '{' '.join(SHELLS)}'",
    ]
    for verb, table in options().items():
        when = f"complete -c recsys -n '__fish_seen_subcommand_from {verb}'"
        for name, known in table.items():
            taken = "" if name in ("help", "print_config") else (f" -x -a '{' '.join(known)}'" if known else " -r -F")
            lines.append(f"{when} -l {name}{taken}")
        if known := options()[verb].get(POSITIONAL.get(verb, ""), ()):
            lines.append(f"{when} -f -a '{' '.join(known)}'")
    return "\n".join(lines)
