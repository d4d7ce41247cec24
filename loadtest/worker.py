"""The load process: `python -m loadtest.worker`, started by the harness with a plan on its standard input.

gevent must replace the blocking standard library before anything else is imported, hence a process of its own.
"""

from gevent import monkey

monkey.patch_all()

from loadtest.stages import main  # noqa: E402

if __name__ == "__main__":
    main()
