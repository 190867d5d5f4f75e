"""How Windows' two shells read a command: what reaches the program as its words.

Only what documentation needs. What a shell would take as something else than a plain command (redirections, variables,
several commands) is an error: a command that is there to be copied should not depend on it.
"""

from __future__ import annotations

import re


class NotPlain(Exception):
    """The shell does something else with the text than hand it to the program."""


def cmd_commands(text: str) -> list[list[str]]:
    """The words of each command of a text for ``cmd.exe``, as a program with Microsoft's C runtime gets them."""
    return [words for words in map(_c_runtime_words, _cmd_lines(text)) if words]


def _cmd_lines(text: str) -> list[str]:
    """The lines after cmd: a caret outside quotation marks goes, and makes what follows plain, a line's end too."""
    lines, quoted, index = [""], False, 0
    while index < len(text):
        character = text[index]
        if character == "^" and not quoted:
            index += 2 if text[index + 1 : index + 2] == "\n" else 1
            lines[-1] += text[index : index + 1]  # after a line's end, too, the next character is plain
        elif character == "\n":
            if quoted:
                raise NotPlain("a quotation mark is not closed on its line")
            lines.append("")
        elif character in "&|<>()" and not quoted:
            raise NotPlain(f"cmd takes {character} for itself")
        else:
            quoted ^= character == '"'
            lines[-1] += character
        index += 1
    if any(re.search(r"%\w+%", line) for line in lines):
        raise NotPlain("cmd replaces a variable")
    return lines


def _c_runtime_words(line: str) -> list[str]:
    """The line as ``argv``: backslashes are plain but before a quotation mark, and ' is an ordinary character."""
    words, word, quoted, started, index = [], "", False, False, 0
    while index < len(line):
        backslashes = re.match(r"\\*", line[index:])[0]
        index += len(backslashes)
        character = line[index : index + 1]
        if character == '"':
            word += "\\" * (len(backslashes) // 2)
            started = True
            if len(backslashes) % 2:
                word += '"'
            elif quoted and line[index + 1 : index + 2] == '"':
                word += '"'
                index += 1
            else:
                quoted = not quoted
        else:
            word += backslashes
            if character in (" ", "\t") and not quoted:
                if word or started:
                    words.append(word)
                word, started = "", False
            else:
                word += character
        index += 1
    if quoted:
        raise NotPlain("a quotation mark is not closed")
    return [*words, word] if word or started else words


def powershell_commands(text: str) -> list[list[str]]:
    """The words of each command of a text for PowerShell, as a program gets them."""
    commands: list[list[str]] = [[]]
    word: str | None = None
    index = 0

    def end_word() -> None:
        nonlocal word
        if word is not None:
            commands[-1].append(word)
        word = None

    while index < len(text):
        character, following = text[index], text[index + 1 : index + 2]
        if character == "`":
            if following == "\n":
                end_word()
            else:
                word = (word or "") + following
            index += 1
        elif character in "\"'":
            if word is None and not commands[-1]:
                raise NotPlain("a quoted first word is a text, not a program; & stands before it")
            part, index = _powershell_text(text, index)
            word = (word or "") + part
        elif character == "\n":
            end_word()
            commands.append([])
        elif character in " \t":
            end_word()
        elif character in "&|<>(){};$," or (word is None and character in "#@"):
            raise NotPlain(f"PowerShell takes {character} for itself")
        elif word is None and re.match(r"-[A-Za-z_?]\w*\.", text[index:]):
            raise NotPlain("PowerShell cuts a word in two that begins with - and has a dot")
        else:
            word = (word or "") + character
        index += 1
    end_word()
    found = [command for command in commands if command]
    if any('"' in word for command in found for word in command):
        raise NotPlain('Windows PowerShell loses " inside a word')
    return found


def _powershell_text(text: str, start: int) -> tuple[str, int]:
    """What a quoted text holds that begins at ``start``, and where it ends."""
    mark, result, index = text[start], "", start + 1
    while index < len(text):
        character, following = text[index], text[index + 1 : index + 2]
        if character == mark and following == mark:
            result += mark
            index += 1
        elif character == mark:
            return result, index
        elif mark == '"' and character == "$" and re.match(r"[\w({?$^:]", following):
            raise NotPlain("PowerShell replaces a variable")
        elif mark == '"' and character == "`":
            result += {"n": "\n", "t": "\t"}.get(following, following)
            index += 1
        elif character == "\n":
            raise NotPlain("a quotation mark is not closed on its line")
        else:
            result += character
        index += 1
    raise NotPlain("a quotation mark is not closed")
