"""The processes of a running gateway: supervisor, workers and the admin process.

Strategy: the supervisor only binds, forks, reaps and passes messages; anything that can fail slowly or run somebody
else's code (parsing a file, importing a policy, serving HTTP) happens in a child that may die without harm.
"""
