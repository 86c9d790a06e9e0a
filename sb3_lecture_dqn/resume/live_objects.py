"""
Pickling the state of objects that live on.

A training run is a graph of objects that refer to each other: model, environments, callbacks, logger. A checkpoint takes the
attributes of each; where an attribute refers to another of these objects, the checkpoint keeps its name and not a copy, and
what is loaded refers to the object of that name in the run that goes on.
"""

import io
import pickle
import types
from collections.abc import Iterator, Mapping
from typing import Any

import cloudpickle
from gymnasium import spaces
from gymnasium.utils import EzPickle

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


class LiveObjects:
    """The objects that are referred to by name, each under a name that is the same in the saved and in the resumed run."""

    def __init__(self) -> None:
        self._by_name: dict[str, Any] = {}
        self._name_by_id: dict[int, str] = {}

    def add(self, name: str, live: Any) -> None:
        """
        Refer to an object by name.

        :param name: Its name
        :param live: The object; one that has a name already keeps that one too
        """
        self._by_name[name] = live
        self._name_by_id.setdefault(id(live), name)

    def add_spaces(self, name: str, owner: Any) -> None:
        """
        Refer to the spaces among an object's attributes by name.

        :param name: Name of the owner
        :param owner: The object
        """
        for attribute, value in vars(owner).items():
            if isinstance(value, spaces.Space):
                self.add(f"{name}.{attribute}", value)

    def named_spaces(self) -> Iterator[tuple[str, spaces.Space[Any]]]:
        """
        The spaces, whose generators are state.

        :return: Names and spaces
        """
        yield from ((name, live) for name, live in self._by_name.items() if isinstance(live, spaces.Space))

    def dumps(self, state: Any) -> bytes:
        """
        Pickle.

        :param state: What to pickle
        :return: The pickle
        :raises Exception: whatever its parts raise that cannot be pickled
        """
        file = io.BytesIO()
        _Pickler(file, self._name_by_id).dump(state)
        return file.getvalue()

    def dumps_attributes(self, attributes: Mapping[Any, Any]) -> tuple[bytes, list[Any]]:
        """
        Pickle those attributes that can be pickled, all in one. Functions are code and not state: they are left as they are.

        :param attributes: Attributes by name
        :return: The pickle of a dictionary, and the names of those that cannot be pickled
        """
        attributes = {name: value for name, value in attributes.items() if not isinstance(value, _FUNCTIONS)}
        try:
            return self.dumps(attributes), []
        except Exception:  # pickling runs code of the attributes' own
            left_out = [name for name, value in attributes.items() if not self._can_pickle(value)]
        return self.dumps({name: value for name, value in attributes.items() if name not in left_out}), left_out

    def loads(self, data: bytes) -> Any:
        """
        Unpickle.

        :param data: What :meth:`dumps` gave
        :return: What was pickled
        """
        return _Unpickler(io.BytesIO(data), self._by_name).load()

    def _can_pickle(self, value: Any) -> bool:
        try:
            self.dumps(value)
        except Exception:
            return False
        return True


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, name_by_id: Mapping[int, str]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._name_by_id = name_by_id

    def persistent_id(self, obj: Any) -> str | None:
        return self._name_by_id.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (EzPickle, io.IOBase)):
            # The pickle of the first is its constructor's arguments, cloudpickle's of the second is a copy of the content.
            raise pickle.PicklingError(f"{type(obj).__name__} pickles without its state")
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, by_name: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._by_name = by_name

    def persistent_load(self, pid: Any) -> Any:
        return self._by_name[pid]
