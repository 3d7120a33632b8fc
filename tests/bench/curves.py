"""Scores of students against samples and against parameters, as a picture of plain SVG.

write_curves(students, Path("docs/students.svg"))         each with name, parameters, teacher, curve
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

WIDTH, HEIGHT, MARGIN, LEGEND = 420, 300, 48, 190
COLOURS = ("#1f6fb2", "#d1495b", "#2e8b57", "#8457a8", "#c98a1b", "#555555")


class Student(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> int: ...

    @property
    def teacher(self) -> float: ...

    @property
    def curve(self) -> Sequence[tuple[int, float]]: ...


def write_curves(students: Sequence[Student], path: Path) -> None:
    most_samples = max(samples for student in students for samples, _ in student.curve)
    most_parameters = max(student.parameters for student in students)
    inside = [
        *axes(0, f"samples, up to {most_samples:,}"),
        *axes(WIDTH, f"parameters, up to {most_parameters / 1e6:.2f} M"),
    ]
    for number, student in enumerate(students):
        colour = COLOURS[number % len(COLOURS)]
        shares = [(samples / most_samples, score / student.teacher) for samples, score in student.curve]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(0, *share) for share in shares))
        inside.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        inside += [dot(*place(0, *share), colour) for share in shares]
        inside.append(dot(*place(WIDTH, student.parameters / most_parameters, shares[-1][1]), colour))
        x, y = 2 * WIDTH + 16, MARGIN + 24 * number
        inside += [dot(x, y, colour), text(x + 12, y + 4, f"{student.name}: {shares[-1][1]:.2f}")]
    size = f'width="{2 * WIDTH + LEGEND}" height="{HEIGHT}"'
    picture = "\n".join(['<rect width="100%" height="100%" fill="white"/>', *inside])
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{picture}\n</svg>\n', encoding="utf-8")


def place(left: int, across: float, up: float) -> tuple[float, float]:
    """Of two shares of 1."""
    return left + MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)


def axes(left: int, name: str) -> list[str]:
    lines = [text(*place(left, 0.0, -0.16), name), text(*place(left, 0.0, 1.06), "share of its teacher's score")]
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        (x0, y0), (x1, _) = place(left, 0.0, share), place(left, 1.0, share)
        lines.append(f'<line x1="{x0}" y1="{y0:.1f}" x2="{x1}" y2="{y0:.1f}" stroke="#dddddd"/>')
        lines.append(text(x0 - 26, y0 + 4, f"{share:.1f}"))
    return lines


def dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'


def text(x: float, y: float, words: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="12" fill="#333333">{words}</text>'
