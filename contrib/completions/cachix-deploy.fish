# fish completion of cachix-deploy, made by tools/manuals.py
function __cachix_deploy
    set -l command
    for word in (commandline -opc)[2..-1]
        set -l longer (string join " " $command $word)
        switch $longer
            case 'activate' 'activate-local' 'agent' 'check' 'deploy' 'deploy activate' 'deploy activate-local' 'deploy agent' 'deploy check' 'deploy doctor' 'deploy push' 'deploy rollback' 'deploy status' 'doctor' 'key' 'key create' 'push' 'rollback' 'status'
                set command $command $word
        end
    end
    set -l joined (string join " " $command)
    contains -- "$joined" $argv
end
complete -c cachix-deploy -f
complete -c cachix-deploy -n '__cachix_deploy ""' -a agent -d 'Stay connected to the workspace, and run what it deploys to this machine'
complete -c cachix-deploy -n '__cachix_deploy ""' -a deploy -d ''
complete -c cachix-deploy -n '__cachix_deploy ""' -a activate -d 'Deploy the store paths of SPEC (a deploy.json, or NAME=/nix/store/... for each agent) to their agents, show their logs, and wait until all have ended'
complete -c cachix-deploy -n '__cachix_deploy ""' -a push -d 'Upload the closure of each PATH (or what a deploy.json names) to the workspaces cache, signed by the caches key, but for the parts that an upstream cache has'
complete -c cachix-deploy -n '__cachix_deploy ""' -a status -d 'Show the agents of this machine, what it runs, and its last deployments'
complete -c cachix-deploy -n '__cachix_deploy ""' -a check -d 'Look at all that a deployment needs, and name a remedy for what is not as it must be (also called doctor)'
complete -c cachix-deploy -n '__cachix_deploy ""' -a doctor -d ''
complete -c cachix-deploy -n '__cachix_deploy ""' -a rollback -d 'Return this machine to the path that was confirmed before the present one'
complete -c cachix-deploy -n '__cachix_deploy ""' -a activate-local -d 'Run a path on this machine, without a workspace, as a deployment would'
complete -c cachix-deploy -n '__cachix_deploy ""' -a key -d ''
complete -c cachix-deploy -n '__cachix_deploy "activate"' -F
complete -c cachix-deploy -n '__cachix_deploy "activate-local"' -F
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a agent -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a activate -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a push -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a status -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a check -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a doctor -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a rollback -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy"' -a activate-local -d ''
complete -c cachix-deploy -n '__cachix_deploy "deploy activate"' -F
complete -c cachix-deploy -n '__cachix_deploy "deploy activate-local"' -F
complete -c cachix-deploy -n '__cachix_deploy "deploy push"' -F
complete -c cachix-deploy -n '__cachix_deploy "key"' -a create -d 'Write a new key that signs deployments into FILE, which only you can read, and print its public key, NAMEKEY'
complete -c cachix-deploy -n '__cachix_deploy "key create"' -F
complete -c cachix-deploy -n '__cachix_deploy "push"' -F
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l activation-timeout -x -d 'Time for an activation, or a rollback script default'
complete -c cachix-deploy -n '__cachix_deploy "activate" "activate-local" "deploy activate" "deploy activate-local"' -l agent -s a -x -d 'Deploy to this agent of SPEC only'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l allow-downgrade -d 'Sign also for machines that run what was signed later'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l async -d 'Start the deployments, and do not wait for them'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l batch -x -d 'Deploy to SIZE agents at a time (a number, or a share such as 10%), to the next ones when all of these have succeeded'
complete -c cachix-deploy -n '__cachix_deploy "agent" "deploy agent"' -l bootstrap -d 'Deploy once to a machine whose own agent takes over, then exit'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l cache -x -d 'Push to this cache'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l cache-key -r -F -d 'Sign what is pushed by the key in FILE instead of the environment (CACHIX_SIGNING_KEY, with or without NAME)'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l canary -x -d 'Deploy to these agents first, and go on only if they succeed'
complete -c cachix-deploy -n '__cachix_deploy "deploy rollback" "rollback"' -l cancel -d 'Cancel a deployment that is under way instead of refusing'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l config -s c -r -F -d 'Cachixs own configuration'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l confirm-timeout -x -d 'Time for a new system to reach the workspace default'
complete -c cachix-deploy -n '__cachix_deploy "agent" "deploy agent"' -l deployment-key -x -d 'Run only deployments that this key (NAMEKEY) has signed'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l expires -x -d 'How long the signature is valid'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l force -d 'In batches, deploy also to agents that run their path already'
complete -c cachix-deploy -n '__cachix_deploy ""' -l help -s h -d 'Show this text'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l host -x -d 'The workspace (CACHIX_HOST), by default https//cachix.org'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l hostname -x -d 'The same, as older releases of Cachixs client call it'
complete -c cachix-deploy -n '__cachix_deploy "agent" "deploy agent"' -l if-stopped -d 'Exit with 0 if an agent of this name is running (for cron)'
complete -c cachix-deploy -n '__cachix_deploy "activate" "check" "deploy activate" "deploy check" "deploy doctor" "deploy status" "doctor" "status"' -l json -d 'Print JSON of activate an object a line (docs/activate-json.rst), else one object'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l max-failures -x -d 'Go on until more than N agents have failed default'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l message -x -d 'The title of this run in a workspace of yours, in place of the commits'
complete -c cachix-deploy -n '__cachix_deploy "agent" "deploy agent"' -l metrics-file -r -F -d 'Keep metrics in this file (NAME.prom), for node_exporters textfile collector'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l offline -x -a 'wait skip fail' -d 'wait for agents that are offline, skip them (they deploy later), or fail before anything is deployed default'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l on -x -d 'Deploy to the agents of SPEC that a LIST of names, globs and labels selects (labels in a workspace of yours), with commas between'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l on-reboot-needed -x -a 'fail boot' -d 'fail or boot'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l on-unit-failure -x -a 'rollback tolerate' -d 'rollback or tolerate'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l pause -x -d 'Time between two batches default'
complete -c cachix-deploy -n '__cachix_deploy "agent" "deploy agent"' -l post-deploy -r -F -d 'Run this program once after each deployment has ended, however it has ended'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l push -d 'Push what SPEC names before it is deployed'
complete -c cachix-deploy -n '__cachix_deploy "agent" "deploy agent"' -l reboot-window -x -d 'Times in which a deployment that asks for it may reboot the machine, by its clock, such as Mon..Fri 0200-0400'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l require-tls -d 'Refuse a workspace that is plain http on another machine (CACHIX_DEPLOY_REQUIRE_TLS=1)'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l rollback-succeeded -d 'Where a roll-out stops, take back those that had succeeded'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l signing-key -r -F -d 'Sign what activate deploys by the key in FILE'
complete -c cachix-deploy -n '__cachix_deploy "activate-local" "deploy activate-local"' -l substituter -x -d 'Download also from this cache'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l timeout -x -d 'Give up waiting after this time'
complete -c cachix-deploy -n '__cachix_deploy "deploy rollback" "rollback"' -l to -x -d 'Roll back to this store path, or to what the deployment of this number ran'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l token-file -r -F -d 'Read the token from FILE instead of the environment (CACHIX_AGENT_TOKEN; CACHIX_ACTIVATE_TOKEN for activate and push)'
complete -c cachix-deploy -n '__cachix_deploy "activate-local" "agent" "check" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "doctor"' -l trusted-key -x -d 'Take the workspaces systems only with a signature by this key (NAMEKEY), whatever key it names itself'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l unknown -x -a 'fail skip' -d 'fail, or skip agents that the workspace does not know default'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l unsigned-rollback -x -d 'Without a signature, return at most to one of the last N paths that this agent has confirmed default'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate" "deploy push" "push"' -l upstream -x -d 'Do not push what this cache has'
complete -c cachix-deploy -n '__cachix_deploy "" "activate" "activate-local" "agent" "check" "deploy activate" "deploy activate-local" "deploy agent" "deploy check" "deploy doctor" "deploy push" "deploy rollback" "deploy status" "doctor" "key create" "push" "rollback" "status"' -l verbose -s v -d 'Print debugging messages, and tracebacks of errors'
complete -c cachix-deploy -n '__cachix_deploy ""' -l version -d 'Show the version'
complete -c cachix-deploy -n '__cachix_deploy "activate" "deploy activate"' -l wait -d 'Wait as long as the workspace is frozen, instead of failing'
