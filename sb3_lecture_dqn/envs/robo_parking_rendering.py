"""The pictures of ``RoboParking-v0``. Importing this module imports pygame, which nothing else of the environment needs."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from gymnasium.error import DependencyNotInstalled

from sb3_lecture_dqn.envs.robo_parking import GOAL_TOLERANCE, LOT_SIDE

try:
    import pygame
except ImportError as error:
    raise DependencyNotInstalled('rendering needs pygame: pip install "gymnasium[box2d]"') from error

SIZE = 600  # pixels, of the picture's sides
SUPERSAMPLING = 3  # drawn that much larger, then scaled down: this is what smooths the edges

# Metres. A position is that of the robot's centre, so the kerbs stand half a robot outside of it.
BODY = 0.36
WHEEL_LENGTH, WHEEL_WIDTH = 0.18, 0.07
HALF_ROBOT = BODY / 2 + WHEEL_WIDTH
KERB = 0.10
KERB_STONES = 13  # along each side; odd, so that all corners look the same
BAY = 0.34  # from the goal to the lines of the bay
ARROW = 0.6  # length of the velocity arrow at 1 m/s

PAPER, INK = (247, 246, 242), (45, 49, 56)
ASPHALT, GRID = (74, 79, 88), (92, 98, 108)
KERB_LIGHT, KERB_DARK = (226, 223, 214), (201, 120, 104)
BAY_FLOOR, LINE = (44, 103, 168), (240, 240, 236)
TRAIL = (255, 207, 92)
WHEEL, ROLLER = (28, 30, 34), (120, 125, 134)
BODY_COLOUR, BODY_EDGE, HEADLIGHT = (236, 112, 62), (168, 70, 34), (255, 244, 214)
ARROW_COLOUR = (120, 226, 220)
PARKED = (38, 138, 84)

State = tuple[float, ...]
Point = tuple[float, float]


def _render_text(text: str, size: int, colour: tuple[int, int, int]) -> pygame.Surface:
    pygame.font.init()  # another environment's close() may have ended pygame, and no font outlives that
    return pygame.font.Font(None, size).render(text, True, colour)


class LotRenderer:
    """
    Draws the lot from above, with the corner (0, 0) at the lower left.

    :param frames_per_second: How fast :meth:`show` lets time pass
    """

    def __init__(self, frames_per_second: int) -> None:
        self._frames_per_second = frames_per_second
        self._window: pygame.Surface | None = None
        self._clock = pygame.time.Clock()
        side = SIZE * SUPERSAMPLING
        self._header = side // 15
        margin = side // 40
        self._pixels_per_metre = (side - self._header - margin) / (LOT_SIDE + 2 * (HALF_ROBOT + KERB))
        self._left = (side - self._pixels(LOT_SIDE)) / 2
        self._bottom = side - margin - self._pixels(HALF_ROBOT + KERB)
        self._lot = self._draw_lot(side)

    def __reduce__(self) -> tuple[type["LotRenderer"], tuple[int]]:
        # pygame's surfaces cannot be pickled, and all of them are drawn anew
        return LotRenderer, (self._frames_per_second,)

    def draw(self, trail: Sequence[State]) -> np.ndarray:
        """
        Draw an episode's picture.

        :param trail: The states (x, y, ẋ, ẏ) since the reset, in m and m/s; the last one is now
        :return: The picture, uint8 of shape (600, 600, 3)
        """
        picture = pygame.surfarray.pixels3d(self._draw(trail))
        return np.transpose(np.array(picture), (1, 0, 2))

    def show(self, trail: Sequence[State]) -> None:
        """
        Show an episode's picture in a window, and wait until the frame's time is over.

        :param trail: As in :meth:`draw`
        """
        # another environment's close() may have ended the display, and no window outlives that
        if self._window is None or pygame.display.get_surface() is not self._window:
            pygame.display.init()
            pygame.display.set_caption("RoboParking")
            self._window = pygame.display.set_mode((SIZE, SIZE))
        self._window.blit(self._draw(trail), (0, 0))
        pygame.event.pump()
        self._clock.tick(self._frames_per_second)
        pygame.display.flip()

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            pygame.display.quit()
            self._window = None

    # From metres to pixels

    def _pixels(self, metres: float) -> int:
        return round(metres * self._pixels_per_metre)

    def _point(self, x: float, y: float) -> Point:
        return self._left + x * self._pixels_per_metre, self._bottom - y * self._pixels_per_metre

    def _rect(self, left: float, bottom: float, width: float, height: float) -> pygame.Rect:
        x, y = self._point(left, bottom + height)
        return pygame.Rect(round(x), round(y), self._pixels(width), self._pixels(height))

    # What stays

    def _draw_lot(self, side: int) -> pygame.Surface:
        surface = pygame.Surface((side, side))
        surface.fill(PAPER)
        self._draw_kerbs(surface)
        edge = -HALF_ROBOT
        pygame.draw.rect(surface, ASPHALT, self._rect(edge, edge, LOT_SIDE - 2 * edge, LOT_SIDE - 2 * edge))
        for metre in range(1, round(LOT_SIDE)):
            for start, end in (((metre, edge), (metre, LOT_SIDE - edge)), ((edge, metre), (LOT_SIDE - edge, metre))):
                pygame.draw.line(surface, GRID, self._point(*start), self._point(*end), SUPERSAMPLING)
        self._draw_bay(surface)
        return surface

    def _draw_kerbs(self, surface: pygame.Surface) -> None:
        outer = HALF_ROBOT + KERB
        length = LOT_SIDE + 2 * outer
        pygame.draw.rect(surface, KERB_LIGHT, self._rect(-outer, -outer, length, length), border_radius=self._pixels(KERB / 2))
        stone_length = length / KERB_STONES
        for i in range(1, KERB_STONES, 2):
            stone = -outer + i * stone_length
            for across in (-outer, LOT_SIDE + HALF_ROBOT):
                pygame.draw.rect(surface, KERB_DARK, self._rect(stone, across, stone_length, KERB))
                pygame.draw.rect(surface, KERB_DARK, self._rect(across, stone, KERB, stone_length))

    def _draw_bay(self, surface: pygame.Surface) -> None:
        size = HALF_ROBOT + BAY
        pygame.draw.rect(surface, BAY_FLOOR, self._rect(-HALF_ROBOT, -HALF_ROBOT, size, size))
        letter = _render_text("P", self._pixels(0.6), LINE)
        surface.blit(letter, letter.get_rect(center=self._point((BAY - HALF_ROBOT) / 2, (BAY - HALF_ROBOT) / 2)))
        width = self._pixels(0.03)
        corner = self._point(BAY, BAY)
        for end in (self._point(BAY, -HALF_ROBOT), self._point(-HALF_ROBOT, BAY)):
            pygame.draw.line(surface, LINE, corner, end, width)

    # What moves

    def _draw(self, trail: Sequence[State]) -> pygame.Surface:
        surface = self._lot.copy()
        self._draw_trail(surface, trail)
        self._draw_robot(surface, trail)
        self._draw_header(surface, trail)
        return pygame.transform.smoothscale(surface, (SIZE, SIZE))

    def _draw_trail(self, surface: pygame.Surface, trail: Sequence[State]) -> None:
        points = [self._point(x, y) for x, y, _, _ in trail]
        for start, end in itertools.pairwise(points):
            pygame.draw.line(surface, TRAIL, start, end, self._pixels(0.018))
        for point in points[:-1]:
            pygame.draw.circle(surface, TRAIL, point, self._pixels(0.022))
        pygame.draw.circle(surface, TRAIL, points[0], self._pixels(0.06), self._pixels(0.02))

    def _draw_robot(self, surface: pygame.Surface, trail: Sequence[State]) -> None:
        x, y, x_velocity, y_velocity = trail[-1]
        offset = BODY / 2 + WHEEL_WIDTH / 2
        for side in (-offset, offset):
            self._draw_wheel(surface, x, y + side, WHEEL_LENGTH, WHEEL_WIDTH)  # rolls along x
            self._draw_wheel(surface, x + side, y, WHEEL_WIDTH, WHEEL_LENGTH)  # rolls along y
        body = self._rect(x - BODY / 2, y - BODY / 2, BODY, BODY)
        pygame.draw.rect(surface, BODY_COLOUR, body, border_radius=self._pixels(0.07))
        pygame.draw.rect(surface, BODY_EDGE, body, self._pixels(0.015), border_radius=self._pixels(0.07))

        heading = next((math.atan2(state[3], state[2]) for state in reversed(trail) if state[2] or state[3]), None)
        if heading is not None:
            self._draw_triangle(surface, HEADLIGHT, (x, y), heading, front=0.14, back=0.03, half_width=0.09)
        speed = math.hypot(x_velocity, y_velocity)
        if speed > 0:
            self._draw_arrow(surface, (x, y), math.atan2(y_velocity, x_velocity), BODY / 2 + ARROW * speed)

    def _draw_wheel(self, surface: pygame.Surface, x: float, y: float, length: float, height: float) -> None:
        wheel = self._rect(x - length / 2, y - height / 2, length, height)
        pygame.draw.rect(surface, WHEEL, wheel, border_radius=self._pixels(0.015))
        for share in (0.25, 0.5, 0.75):  # the rollers that let it slide sideways
            if length > height:
                column = wheel.left + round(share * wheel.width)
                start, end = (column, wheel.top), (column, wheel.bottom - 1)
            else:
                row = wheel.top + round(share * wheel.height)
                start, end = (wheel.left, row), (wheel.right - 1, row)
            pygame.draw.line(surface, ROLLER, start, end, self._pixels(0.01))

    def _draw_arrow(self, surface: pygame.Surface, centre: Point, angle: float, length: float) -> None:
        tip = length - 0.05
        start = (centre[0] + BODY / 2 * math.cos(angle), centre[1] + BODY / 2 * math.sin(angle))
        end = (centre[0] + tip * math.cos(angle), centre[1] + tip * math.sin(angle))
        pygame.draw.line(surface, ARROW_COLOUR, self._point(*start), self._point(*end), self._pixels(0.035))
        self._draw_triangle(surface, ARROW_COLOUR, centre, angle, front=length + 0.05, back=tip - 0.03, half_width=0.06)

    def _draw_triangle(
        self,
        surface: pygame.Surface,
        colour: tuple[int, int, int],
        centre: Point,
        angle: float,
        *,
        front: float,
        back: float,
        half_width: float,
    ) -> None:
        cos, sin = math.cos(angle), math.sin(angle)
        corners = ((front, 0.0), (back, half_width), (back, -half_width))
        points = [self._point(centre[0] + a * cos - b * sin, centre[1] + a * sin + b * cos) for a, b in corners]
        pygame.draw.polygon(surface, colour, points)

    def _draw_header(self, surface: pygame.Surface, trail: Sequence[State]) -> None:
        x, y, x_velocity, y_velocity = trail[-1]
        is_parked = math.hypot(*trail[-1]) < GOAL_TOLERANCE
        left = (f"step {len(trail) - 1}", INK)
        middle = (f"distance {math.hypot(x, y):.2f} m", INK)
        right = ("parked", PARKED) if is_parked else (f"speed {math.hypot(x_velocity, y_velocity):.2f} m/s", INK)
        width, margin = surface.get_width(), round(self._left - self._pixels(HALF_ROBOT))
        for (text, colour), anchor, column in (
            (left, "midleft", margin),
            (middle, "center", width // 2),
            (right, "midright", width - margin),
        ):
            image = _render_text(text, round(self._header * 0.75), colour)
            surface.blit(image, image.get_rect(**{anchor: (column, self._header // 2)}))
