"""Work in child processes that live for many jobs: started, watched, stopped and replaced in one place."""
