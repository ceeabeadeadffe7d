"""Conversations with a customer over a database: the retail shop and the airline of tau-bench."""

from understudy.environments.tau.customer import UserModel
from understudy.environments.tau.database import Database, read_tables
from understudy.environments.tau.service import DOMAINS, Domain, Service, domain_tools, replay

__all__ = ["DOMAINS", "Database", "Domain", "Service", "UserModel", "domain_tools", "read_tables", "replay"]
