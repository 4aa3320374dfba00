-- A database as the workspace made it when its schema had version 1, and some rows.
CREATE TABLE agents (
  id VARCHAR NOT NULL,
  name VARCHAR NOT NULL,
  system VARCHAR NOT NULL,
  version VARCHAR NOT NULL,
  created_on VARCHAR NOT NULL,
  seen_on VARCHAR NOT NULL,
  connected BOOLEAN NOT NULL,
  last_index INTEGER NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (name)
);
CREATE TABLE caches (
  id INTEGER NOT NULL,
  name VARCHAR NOT NULL,
  public BOOLEAN NOT NULL,
  key_name VARCHAR NOT NULL,
  public_key VARCHAR NOT NULL,
  created_on VARCHAR NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (name)
);
CREATE TABLE deployments (
  id VARCHAR NOT NULL,
  agent_id VARCHAR NOT NULL,
  "index" INTEGER NOT NULL,
  store_path VARCHAR NOT NULL,
  rollback_script VARCHAR,
  status VARCHAR NOT NULL,
  reason TEXT,
  closure_size BIGINT,
  created_on VARCHAR NOT NULL,
  started_on VARCHAR,
  finished_on VARCHAR,
  log_next INTEGER NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (agent_id, "index"),
  FOREIGN KEY(agent_id) REFERENCES agents (id)
);
CREATE TABLE log_chunks (
  deployment_id VARCHAR NOT NULL,
  first INTEGER NOT NULL,
  count INTEGER NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (deployment_id, first),
  FOREIGN KEY(deployment_id) REFERENCES deployments (id)
);
CREATE TABLE meta (
  "key" VARCHAR NOT NULL,
  value TEXT NOT NULL,
  PRIMARY KEY ("key")
);
CREATE TABLE tokens (
  id INTEGER NOT NULL,
  kind VARCHAR NOT NULL,
  hash VARCHAR NOT NULL,
  description TEXT NOT NULL,
  cache_id INTEGER,
  created_on VARCHAR NOT NULL,
  expires_on VARCHAR,
  revoked_on VARCHAR,
  PRIMARY KEY (id),
  UNIQUE (hash),
  FOREIGN KEY(cache_id) REFERENCES caches (id)
);
CREATE INDEX deployments_by_status ON deployments (agent_id, status);
INSERT INTO meta VALUES('version','1');
INSERT INTO meta VALUES('public_url','http://127.0.0.1:8080');
INSERT INTO agents VALUES('7c1d3c52-0b0a-4f0e-9a39-d8f0f0f5b4a1','web','x86_64-linux','1.11.1','2026-11-25T10:00:00.000001Z','2026-11-25T10:00:00.000002Z',1,2);
INSERT INTO deployments VALUES('08792708-13a0-41b8-b9fb-cf02104b6354','7c1d3c52-0b0a-4f0e-9a39-d8f0f0f5b4a1',1,'/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-system-a',NULL,'Failed','it failed',4711,'2026-11-25T10:01:00.000001Z','2026-11-25T10:01:01Z','2026-11-25T10:02:00Z',0);
INSERT INTO deployments VALUES('9c646519-73bc-4e91-aa54-d35d5295114a','7c1d3c52-0b0a-4f0e-9a39-d8f0f0f5b4a1',2,'/nix/store/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-system-b','/nix/store/cccccccccccccccccccccccccccccccc-script','InProgress',NULL,NULL,'2026-11-25T10:03:00.000001Z','2026-11-25T10:03:01Z',NULL,1);
INSERT INTO log_chunks VALUES('9c646519-73bc-4e91-aa54-d35d5295114a',0,1,'{"line":"a line","time":"2026-11-25T10:03:02Z"}');
