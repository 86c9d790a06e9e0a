"""
Film greedy episodes of the latest trained model as a GIF.

    python examples/film.py --env LunarLander-v2 --seeds 3 8 --gif landing.gif

Needs ``sb3-lecture-dqn[extra]``.
"""

import argparse
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import yaml
from _arguments import find_training, gif_file, integer_at_least
from PIL import Image
from rl_zoo3.utils import get_saved_hyperparams, get_wrapper_class

from sb3_lecture_dqn import LectureDQN

FRAMES_AT_REST = 8


def write_gif(frames: list[np.ndarray], file: Path, width: int, frames_per_second: int, n_colours: int = 64) -> None:
    """Write frames with one palette for all: without dithering, what stands still is the same in each and costs nothing."""
    height = round(frames[0].shape[0] * width / frames[0].shape[1])
    images = [Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS) for frame in frames]
    palette = images[len(images) // 2].quantize(n_colours, method=Image.Quantize.MAXCOVERAGE)
    first, *others = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    first.save(file, save_all=True, append_images=others, duration=1000 // frames_per_second, loop=0, optimize=False)
    print(f"wrote {file}, {len(frames)} frames, {file.stat().st_size / 1e6:.2f} MB")


def play(model: LectureDQN, env: gymnasium.Env[np.ndarray, int], observation: np.ndarray) -> list[np.ndarray]:
    """The frames of one greedy episode, which goes on from the observation; the last one stays for a moment."""
    frames: list[np.ndarray] = [env.render()]  # type: ignore[list-item]
    is_over = False
    while not is_over:
        action, _ = model.predict(observation, deterministic=True)
        observation, _, terminated, truncated, _ = env.step(int(action))
        frames.append(env.render())  # type: ignore[arg-type]
        is_over = terminated or truncated
    return frames + [frames[-1]] * FRAMES_AT_REST


def make_env(env_id: str, settings: Path) -> gymnasium.Env[Any, int]:
    """The environment that a model was trained in, with its arguments and wrappers, and with pictures."""
    hyperparams, _ = get_saved_hyperparams(str(settings), test_mode=True)
    env_kwargs = yaml.unsafe_load((settings / "args.yml").read_text())["env_kwargs"] or {}
    for name in ("frame_stack", "normalize"):
        if hyperparams.get(name):
            raise SystemExit(f"error: --env must be of an entry without {name}, got {env_id}: take rl_zoo3.record_video")
    env = gymnasium.make(env_id, render_mode="rgb_array", **env_kwargs)
    wrap = get_wrapper_class(hyperparams)
    return env if wrap is None else wrap(env)


def main() -> None:
    """Load, play, film."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="LunarLander-v2", help="environment id")
    parser.add_argument("--folder", default="logs", help="the zoo's log folder")
    parser.add_argument("--seeds", nargs="+", type=integer_at_least(0), default=[0], help="seed of each episode")
    parser.add_argument("--gif", type=gif_file, default=Path("film.gif"), help="where to write the GIF")
    parser.add_argument("--width", type=integer_at_least(1), default=360, help="width in pixels")
    parser.add_argument("--every", type=integer_at_least(1), default=3, help="keep each so many-th frame")
    arguments = parser.parse_args()

    model_path, settings = find_training(parser, arguments.env, arguments.folder)
    model = LectureDQN.load(model_path, device="cpu")
    env = make_env(arguments.env, settings)
    frames: list[np.ndarray] = []
    for seed in arguments.seeds:
        observation, _ = env.reset(seed=seed)
        frames += play(model, env, observation)[:: arguments.every]
    env.close()
    write_gif(frames, arguments.gif, arguments.width, max(env.metadata["render_fps"] // arguments.every, 1))


if __name__ == "__main__":
    main()
