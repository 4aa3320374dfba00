# bash completion of cachix-deploy, made by tools/manuals.py
_cachix_deploy() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} path= word i
  # bash splits --option=value into three words
  if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then
    prev=${COMP_WORDS[COMP_CWORD-2]}
  fi
  COMPREPLY=()
  case $prev in
    --host) :; return ;;
    --hostname) :; return ;;
    -c|--config) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --token-file) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --trusted-key) :; return ;;
    --deployment-key) :; return ;;
    --unsigned-rollback) :; return ;;
    --signing-key) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --expires) :; return ;;
    --confirm-timeout) :; return ;;
    --activation-timeout) :; return ;;
    --on-unit-failure) COMPREPLY=($(compgen -W "rollback tolerate" -- "$cur")); return ;;
    --on-reboot-needed) COMPREPLY=($(compgen -W "fail boot" -- "$cur")); return ;;
    --reboot-window) :; return ;;
    --post-deploy) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --metrics-file) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    -a|--agent) :; return ;;
    --on) :; return ;;
    --canary) :; return ;;
    --batch) :; return ;;
    --max-failures) :; return ;;
    --pause) :; return ;;
    --offline) COMPREPLY=($(compgen -W "wait skip fail" -- "$cur")); return ;;
    --unknown) COMPREPLY=($(compgen -W "fail skip" -- "$cur")); return ;;
    --message) :; return ;;
    --to) :; return ;;
    --substituter) :; return ;;
    --cache) :; return ;;
    --cache-key) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")); return ;;
    --upstream) :; return ;;
    --timeout) :; return ;;
  esac
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${path:+$path }${COMP_WORDS[i]}
    case $word in "activate"|"activate-local"|"agent"|"check"|"deploy"|"deploy activate"|"deploy activate-local"|"deploy agent"|"deploy check"|"deploy doctor"|"deploy push"|"deploy rollback"|"deploy status"|"doctor"|"key"|"key create"|"push"|"rollback"|"status") path=$word ;; esac
  done
  local words= files=
  case $path in
    "") words="agent deploy activate push status check doctor rollback activate-local key --activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --help --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --unsigned-rollback= --verbose --version" ;;
    "activate") words="--activation-timeout= --agent= --allow-downgrade --async --batch= --cache= --cache-key= --canary= --config= --confirm-timeout= --expires= --force --host= --hostname= --json --max-failures= --message= --offline= --on= --on-reboot-needed= --on-unit-failure= --pause= --push --require-tls --rollback-succeeded --signing-key= --timeout= --token-file= --unknown= --unsigned-rollback= --upstream= --verbose --wait" files=1 ;;
    "activate-local") words="--activation-timeout= --agent= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --substituter= --token-file= --trusted-key= --unsigned-rollback= --verbose" files=1 ;;
    "agent") words="--activation-timeout= --allow-downgrade --bootstrap --cache= --cache-key= --config= --confirm-timeout= --deployment-key= --expires= --host= --hostname= --if-stopped --metrics-file= --on-reboot-needed= --on-unit-failure= --post-deploy= --reboot-window= --require-tls --signing-key= --token-file= --trusted-key= --unsigned-rollback= --verbose" ;;
    "check") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --json --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --trusted-key= --unsigned-rollback= --verbose" ;;
    "deploy") words="agent activate push status check doctor rollback activate-local" ;;
    "deploy activate") words="--activation-timeout= --agent= --allow-downgrade --async --batch= --cache= --cache-key= --canary= --config= --confirm-timeout= --expires= --force --host= --hostname= --json --max-failures= --message= --offline= --on= --on-reboot-needed= --on-unit-failure= --pause= --push --require-tls --rollback-succeeded --signing-key= --timeout= --token-file= --unknown= --unsigned-rollback= --upstream= --verbose --wait" files=1 ;;
    "deploy activate-local") words="--activation-timeout= --agent= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --substituter= --token-file= --trusted-key= --unsigned-rollback= --verbose" files=1 ;;
    "deploy agent") words="--activation-timeout= --allow-downgrade --bootstrap --cache= --cache-key= --config= --confirm-timeout= --deployment-key= --expires= --host= --hostname= --if-stopped --metrics-file= --on-reboot-needed= --on-unit-failure= --post-deploy= --reboot-window= --require-tls --signing-key= --token-file= --trusted-key= --unsigned-rollback= --verbose" ;;
    "deploy check") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --json --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --trusted-key= --unsigned-rollback= --verbose" ;;
    "deploy doctor") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --json --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --trusted-key= --unsigned-rollback= --verbose" ;;
    "deploy push") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --unsigned-rollback= --upstream= --verbose" files=1 ;;
    "deploy rollback") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --cancel --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --to= --token-file= --unsigned-rollback= --verbose" ;;
    "deploy status") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --json --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --unsigned-rollback= --verbose" ;;
    "doctor") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --json --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --trusted-key= --unsigned-rollback= --verbose" ;;
    "key") words="create" ;;
    "key create") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --unsigned-rollback= --verbose" files=1 ;;
    "push") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --unsigned-rollback= --upstream= --verbose" files=1 ;;
    "rollback") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --cancel --config= --confirm-timeout= --expires= --host= --hostname= --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --to= --token-file= --unsigned-rollback= --verbose" ;;
    "status") words="--activation-timeout= --allow-downgrade --cache= --cache-key= --config= --confirm-timeout= --expires= --host= --hostname= --json --on-reboot-needed= --on-unit-failure= --require-tls --signing-key= --token-file= --unsigned-rollback= --verbose" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
  [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
  if [[ $files && $cur != -* ]]; then
    compopt -o filenames; COMPREPLY+=($(compgen -f -- "$cur"))
  fi
  return 0
}
complete -F _cachix_deploy cachix-deploy
